"""The registry of experiments: every entry can be built at every budget, and says what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.entry import BUDGETS, Computed, Entry, Published
from experiments.halving import Following, Halving, StartOf
from experiments.jobs import Job
from experiments.registry import ENTRIES, chosen
from experiments.training import configuration
from kfo_ext.trainer.recipe import build_learner, build_optimizer


def first_jobs(entry: Entry, budget: str) -> list[Job]:
    """The runs that an entry begins with, all of its own settings."""
    work = entry.works[budget]
    if isinstance(work, StartOf):
        work = work.work
    if isinstance(work, Computed | Following):
        return []
    return work.missing({})


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_builds_its_learner(name):
    entry = ENTRIES[name]
    root = Path("absent") if entry.data else None
    for budget in entry.works:
        jobs = first_jobs(entry, budget)
        if budget == "ci":
            assert jobs or isinstance(entry.works[budget], Computed)
            assert all(job.iterations == 2 for job in jobs)
        for job in jobs:
            # Every option has an effect, or the configuration refuses it.
            config = configuration(job, root)
            assert config.threads == 1
        for job in jobs[:1]:
            config = configuration(job, root)
            learner = build_learner(config)
            assert build_optimizer(config, learner).param_groups[0]["lr"] == config.meta_lr


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_two_methods_are_tuned_by_the_same_runs(budget):
    names: dict[str, str] = {}
    for entry in ENTRIES.values():
        if isinstance(entry.works.get(budget), Halving | StartOf):
            for job in first_jobs(entry, budget):
                assert names.setdefault(job.key, entry.name) == entry.name, job.settings


def test_a_following_entry_names_one_that_is_tuned():
    for entry in ENTRIES.values():
        for budget, work in entry.works.items():
            if isinstance(work, StartOf | Following):
                assert work.of in ENTRIES
                assert len(first_jobs(ENTRIES[work.of], budget)) > 1


def test_published_numbers_are_percentages_with_their_certainty():
    for entry in ENTRIES.values():
        for published in entry.published:
            assert published.value is None or 20 < published.value < 100
    with pytest.raises(ValueError, match="Table 9: expected a value, or certainty 'unknown'"):
        Published("Table 9")
    with pytest.raises(ValueError, match="x: says neither what is computed nor why nothing is"):
        Entry(name="x", title="x", group="g", works={})
    with pytest.raises(ValueError, match="x: expected budgets of ci, cpu, gpu, paper, got night"):
        Entry(name="x", title="x", group="g", works={"night": Computed(function=dict)})


def test_names_and_groups_choose_entries():
    assert [entry.name for entry in chosen([])] == list(ENTRIES)
    assert {entry.group for entry in chosen(["table-b4"])} == {"table-b4"}
    assert chosen(["omniglot-cnn2-kfo"]) == [ENTRIES["omniglot-cnn2-kfo"]]
    with pytest.raises(ValueError, match=r"got 'omniglot-cnn2-kf'; the nearest are omniglot-cnn2-kfo"):
        chosen(["omniglot-cnn2-kf"])
    with pytest.raises(ValueError, match=r"got '###'; `python -m experiments list` shows them"):
        chosen(["###"])
