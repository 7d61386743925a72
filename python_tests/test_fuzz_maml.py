"""200 of the cases of fuzz_maml.py, and that they reach what they are for."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz_maml import run_case

COUNTS: Counter[str] = Counter()


@pytest.mark.parametrize("first", range(0, 200, 20))
def test_learners_equal_plain_torch(first):
    for seed in range(first, first + 20):
        COUNTS[run_case(seed)] += 1


def test_every_kind_of_network_takes_every_route_it_has():
    if sum(COUNTS.values()) < 200:
        pytest.skip("needs the other tests of this file")
    for learner in ("MAML", "ANIL"):
        for network in ("cnn", "mlp", "convolutional"):
            assert COUNTS[f"{learner} of {network}, vmap"] >= 10
        assert COUNTS[f"{learner} of cnn, loop"] >= 2
