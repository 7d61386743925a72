"""The outputs of a launch of `form_kernel` and the terms of each, encoded as arguments of the launch.

Outputs have the slots of R, G, L and Y, from 0 to 3. The terms 0, 1 and 2 replace R, G or L by its cotangent ddR, ddG
or ddL; the term 3 replaces nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

Terms = tuple[int, ...]
# Slot, and first, last (exclusive) and step of the terms.
Output = tuple[int, int, int, int]

# The slots of each compilation of `form_kernel`.
FORMS = ((3,), (0, 1, 2))
# Bits of each output in the number that encodes them all; as in `kernels`.
_OUTPUT_BITS = 9

# The only term of the first two orders, in which no cotangent replaces an operand.
PLAIN = (3,)


def double_backward_terms(has: Sequence[bool], need: Sequence[bool]) -> list[Terms | None]:
    """The terms of each output of a double backward.

    Args:
        has: whether ddR, ddG and ddL are given.
        need: whether the outputs for R, G, L and Y are needed.

    Returns:
        For each output the given cotangents of other slots, or None if it is not needed.
    """
    return [
        tuple(term for term in range(3) if has[term] and term != slot) if needed else None
        for slot, needed in enumerate(need)
    ]


def wanted_outputs(terms: Sequence[Terms | None]) -> tuple[Output, ...]:
    """The needed outputs of a launch of `form_kernel`.

    Args:
        terms: for each slot the terms of its output, or None if it is not needed.

    Returns:
        Slot, and first, last and step of the terms, of each needed output.
    """
    return tuple((slot, *_range(term)) for slot, term in enumerate(terms) if term is not None)


def packed(outputs: Sequence[Output]) -> int:
    """Encode outputs as the integer that `form_kernel` decodes.

    Args:
        outputs: at most three.

    Returns:
        An integer of at most 32 bits.
    """
    bits = [slot | first << 2 | last << 4 | step << 7 for slot, first, last, step in outputs]
    return sum(output << _OUTPUT_BITS * i for i, output in enumerate(bits))


def _range(terms: Terms) -> tuple[int, int, int]:
    """First, last (exclusive) and step that run through at most three rising numbers below 3."""
    if not terms:
        return 0, 0, 1
    return terms[0], terms[-1] + 1, terms[1] - terms[0] if len(terms) > 1 else 1
