"""Which outputs a launch of `form_kernel` makes, and the terms of each: numbers that it is given when it runs.

Outputs have the slots of R, G, L and Y, from 0 to 3. The terms 0, 1 and 2 put ddR, ddG and ddL in the place of R, G and
L; the term 3 puts none.
"""

from __future__ import annotations

from collections.abc import Sequence

Terms = tuple[int, ...]
# Slot, and first, last (exclusive) and step of the terms.
Output = tuple[int, int, int, int]

# The slots of each compilation of `form_kernel`.
FORMS = ((3,), (0, 1, 2))
# Of each output in the number that tells them all; as in `kernels`.
_OUTPUT_BITS = 9

# The one term of the first two orders, in which no operand gives way to its cotangent.
PLAIN = (3,)


def double_backward_terms(has: Sequence[bool], need: Sequence[bool]) -> list[Terms | None]:
    """Per output (R, G, L, Y) its terms: the present cotangents of other slots; None for an output not needed."""
    return [
        tuple(term for term in range(3) if has[term] and term != slot) if needed else None
        for slot, needed in enumerate(need)
    ]


def wanted_outputs(terms: Sequence[Terms | None]) -> tuple[Output, ...]:
    """Slot, first, last and step of the terms of each output of `form_kernel` that has terms."""
    return tuple((slot, *_range(term)) for slot, term in enumerate(terms) if term is not None)


def packed(outputs: Sequence[Output]) -> int:
    """The number that tells `form_kernel` its outputs: at most three, which fit in 32 bits."""
    bits = [slot | first << 2 | last << 4 | step << 7 for slot, first, last, step in outputs]
    return sum(output << _OUTPUT_BITS * i for i, output in enumerate(bits))


def _range(terms: Terms) -> tuple[int, int, int]:
    """First, last (exclusive) and step that run through at most three rising numbers below 3."""
    if not terms:
        return 0, 0, 1
    return terms[0], terms[-1] + 1, terms[1] - terms[0] if len(terms) > 1 else 1
