"""kfo_ext/bench/timing.py on made-up clocks: how many calls make a sample, and what comes before it."""

from __future__ import annotations

import pytest

from kfo_ext.bench import timing


def clock(*seconds):
    """A sample that reads these seconds in turn, the last ones from then on; and the calls that it was asked for."""
    asked = []

    def sample(function, calls):
        asked.append(calls)
        return seconds[min(len(asked), len(seconds)) - 1]

    return sample, asked


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [((5e-3, 1e-3, 1e-4), 200), ((0.03, 1e-3), 20), ((0.2,), 1), ((0.03,), 1), ((1e-4, 5e-3), 200)],
)
def test_calls_of_a_sample(seconds, calls):
    sample, asked = clock(*seconds)
    found = timing.interleaved({"f": print}, 2, 0.02, sample)["f"]
    assert found.calls_per_repeat == calls == asked[-1]
    # The slow first calls of what is fast do not decide; what is long is not called again to make sure.
    assert len(asked) == 2 + (1 if seconds[0] > 0.1 else timing.CALIBRATIONS)


def test_a_twin_has_the_calls_of_the_other():
    seen = {"one": set(), "two": set()}

    def sample(name, calls):
        seen[name].add(calls)
        return {"one": 1e-3, "two": 0.5}[name]

    found = timing.interleaved({name: name for name in seen}, 2, 0.02, sample, {"two": "one"})
    assert found["two"].calls_per_repeat == found["one"].calls_per_repeat == 20 and seen["two"] == {20}


def test_a_pause_before_a_sample(monkeypatch):
    done = []
    monkeypatch.setattr(timing.time, "sleep", done.append)
    assert timing.rested(lambda function, calls: done.append(calls) or 1.5)(print, 7) == 1.5
    assert done == [timing.PAUSE, 7]


def test_neighbours_take_turns_to_be_first():
    turns = []

    def sample(function, calls):
        turns.append(function)
        return 1.0

    found = timing.samples_of({name: name for name in "abc"}, 4, 0.02, sample)
    assert ["".join(turns[i : i + 3]) for i in range(3, 15, 3)] == ["abc", "acb", "cab", "cba"]
    assert found["a"] == ([1.0] * 4, 1)
