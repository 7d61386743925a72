"""Several ranks: equal to one process in float64, one message when they end, and the last checkpoint whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from deadlines import seconds
from rank_checks import EVALUATED, OPTIONS, Followed, Uneven, seeded, steps, uneven_batch

from kfo_ext.runs import RunFolder, checkpoint
from kfo_ext.runs.metrics import is_validation, read_metrics
from kfo_ext.trainer import Config, Trainer, evaluate, evaluate_run
from kfo_ext.trainer.ranks import Ranks
from kfo_ext.trainer.recipe import build_family, build_learner

SIZES = (2, 3)
HERE = Path(__file__).parent
TRAIN = [
    "train", "--dataset", "sinusoid", "--inner-lr", "0.01", "--hidden", "4", "--steps", "1", "--meta-batch", "3",
    "--validation-tasks", "4", "--validation-every", "10", "--dtype", "float64", "--threads", "1",
]  # fmt: skip
sizes = pytest.mark.parametrize("size", SIZES)


def torchrun(size: int, *command, **options) -> subprocess.Popen:
    """Starts so many ranks of a program; its own options follow a --, as --run would be taken for --run-path."""
    # Two cores: ranks that all spin for the next message would wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, *command]
    return subprocess.Popen(
        list(map(str, line)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A folder with runs of one process: `whole`, and for each size one stopped half-way."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    trainer = Trainer.start(Config(**OPTIONS), folder / "whole")
    trainer.fit()
    for size in SIZES:
        Trainer.start(Config(**{**OPTIONS, "iterations": 10}), folder / f"for-{size}").fit()
    return folder, trainer


@pytest.fixture(scope="module")
def found(one):
    """What each rank found, by size and rank."""
    everything = {}
    for size in SIZES:
        process = torchrun(size, HERE / "rank_checks.py", one[0])
        out, err = process.communicate(timeout=seconds(120))
        assert process.returncode == 0, out + err
        files = [one[0] / f"found-{size}-{rank}.pt" for rank in range(size)]
        everything[size] = [torch.load(file, weights_only=False) for file in files]
    return everything


def assert_close(a, b) -> None:
    """Equal to 1e-10, which is above rounding and below any task left out."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list | tuple):
        for pair in zip(a, b, strict=True):
            assert_close(*pair)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    else:
        assert a == b


@sizes
def test_parameters_equal_those_of_one_process(size, one, found):
    folder, trainer = one
    for rank in range(size):
        assert_close(found[size][rank]["whole"], trainer.learner.state_dict())
        for name, value in found[size][rank]["whole"].items():
            assert torch.equal(value, found[size][0]["whole"][name]) if isinstance(value, torch.Tensor) else True
    here = folder / f"ranks-{size}" / "whole"
    for ours, theirs in zip(read_metrics(here / "metrics.jsonl"), read_metrics(folder / "whole" / "metrics.jsonl")):
        assert ours | {"elapsed": 0} == pytest.approx(theirs | {"elapsed": 0}, abs=1e-10)
    written = {path.name for path in (folder / "whole").iterdir()} | {"eval-test-best.json"}
    assert {path.name for path in here.iterdir()} == written
    assert len(json.loads((here / "environment.json").read_text())) == 1


@sizes
def test_a_run_resumes_at_another_number_of_ranks(size, one, found):
    folder, trainer = one
    for rank in range(size):
        assert_close(found[size][rank]["resumed"], trainer.learner.state_dict())
    alone = Trainer.resume(folder / f"ranks-{size}" / "half", iterations=20)
    alone.fit()
    assert_close(alone.learner.state_dict(), trainer.learner.state_dict())


@sizes
def test_an_evaluation_is_that_of_one_process_to_the_bit(size, one, found):
    config = Config(**OPTIONS)
    learner, family = build_learner(config), build_family(config, "test", seed=0)
    for name, options in (("evaluation", EVALUATED), ("none for some", {"tasks": 2, "batch": 2})):
        expected = evaluate(learner, family, **options)
        for rank in range(size):
            scores = found[size][rank][name]
            assert torch.equal(scores["losses"], expected.losses)
            assert torch.equal(scores["metrics"], expected.metrics)
            assert scores["digest"] == expected.digest
    score = evaluate_run(RunFolder(one[0] / f"ranks-{size}" / "whole"), tasks=9, save=False)
    assert [rank["score"] for rank in found[size]] == [score.content] * size


@sizes
def test_a_step_reports_all_tasks_and_leaves_alone_what_none_uses(size, found):
    state, reports = steps(seeded(Uneven), uneven_batch())
    assert not torch.equal(state["seldom.weight"], seeded(Uneven).seldom.weight)
    for rank in range(size):
        assert_close(list(found[size][rank]["uneven"]), [state, reports])
        assert found[size][rank]["nan"].startswith("the query loss of task 4 is nan")
        assert found[size][rank]["kept"]


@sizes
def test_what_ranks_cannot_do_together_is_refused_by_name(size, found):
    last = size - 1
    for rank in range(size):
        here = found[size][rank]
        same = "start all ranks with the same options, data and versions"
        assert here["seed"] == f"rank {last}: seed: expected 0 as on rank 0, got 1; {same}"
        assert here["version"] == f"rank 1: torch: expected '2.10' as on rank 0, got '2.9'; {same}"
        assert here["data"] == f"rank 1: data: expected 'data 0' as on rank 0, got 'data 1'; {same}"
        assert here["few"] == f"meta_batch: expected at least one task for each of {size} ranks, got {last}"
        assert here["small"] == f"batch: expected at least one task for each of {size} ranks, got {last}"
        assert here["device"].startswith(f"device: expected 'cuda' with {size} ranks, each on its own device, got")
        assert here["graph"] == f"cuda_graph: expected one process, got {size} ranks: leave it out with several"
        assert here["followed"].startswith("group: the forward changes the buffer 'model.norm.running_mean', and each")
        assert here["left"] == []
    # One process takes it.
    steps(seeded(Followed), uneven_batch())


@sizes
def test_all_ranks_stop_together_when_one_is_asked_to(size, one, found):
    outcomes = [rank["interrupted"] for rank in found[size]]
    assert {outcome.reason for outcome in outcomes} == {"interrupted"}
    assert len({outcome.progress.iteration for outcome in outcomes}) == 1
    saved = checkpoint.load(one[0] / f"ranks-{size}" / "endless" / "last.pt")
    assert saved["progress"]["iteration"] == outcomes[0].progress.iteration > 0


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_the_parts_of_the_ranks_are_the_whole(count):
    ranks = [Ranks() for _ in range(count)]
    for rank, one in enumerate(ranks):
        one.rank, one.size = rank, count
    for items in (0, 1, count, 2 * count + 1):
        parts = [list(range(items))[one.part(items)] for one in ranks]
        assert [item for part in parts for item in part] == list(range(items))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.fixture
def started():
    """Starts `kfo train` on so many ranks, of which none outlives the test."""
    processes = []

    def start(size: int, *options) -> subprocess.Popen:
        before = [option for option in options if str(option).startswith("--max-restarts")]
        after = [option for option in options if option not in before]
        processes.append(torchrun(size, *before, "-m", "--", "kfo_ext", *TRAIN, *after, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        for rank in children(process):
            os.kill(rank, signal.SIGKILL)
        process.kill()
        process.communicate()


def children(process: subprocess.Popen) -> list[int]:
    """The ranks' process ids, in their order."""
    try:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(number) for number in text.split() if b"kfo_ext" in Path(f"/proc/{number}/cmdline").read_bytes()]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + seconds(60)
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("kfo: ")]


def test_a_killed_rank_ends_all_and_leaves_the_last_checkpoint(started, tmp_path):
    run = tmp_path / "run"
    process = started(2, "--run", run, "--iterations", 10**9)
    wait_for(run / "best.pt", process)
    ranks = children(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    # Far below the timeout of ten minutes: gloo notices at once.
    _, err = process.communicate(timeout=seconds(30))
    assert process.returncode != 0
    # torchrun's SIGTERM may come before the other rank notices.
    assert len(said(err)) <= 1
    assert all(line.startswith("kfo: rank 0: another rank has ended, or was silent") for line in said(err))
    assert not any(Path(f"/proc/{number}").exists() for number in ranks)
    iteration = checkpoint.load(run / "last.pt")["progress"]["iteration"]
    assert iteration % 10 == 0
    checkpoint.load(run / "best.pt")
    Trainer.resume(run, iterations=iteration + 1).fit()


def test_a_restart_goes_on_from_the_last_checkpoint(started, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    process = started(2, "--max-restarts=1", "--run", run, "--iterations", 300)
    wait_for(run / "best.pt", process)
    # The one that writes.
    os.kill(children(process)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=seconds(60))
    assert process.returncode == 0, err
    assert out.count(f"run folder: {run}") == 2
    assert "finished at iteration 300" in out
    assert len(json.loads((run / "environment.json").read_text())) == 2
    assert [r["iteration"] for r in read_metrics(run / "metrics.jsonl") if not is_validation(r)] == [*range(1, 301)]
    trainer = Trainer.start(Config.load(run / "config.json"), alone)
    trainer.fit()
    assert_close(checkpoint.load(run / "last.pt")["learner"], dict(trainer.learner.state_dict()))


def test_ctrl_c_saves_once_and_ends_all(started, tmp_path):
    run = tmp_path / "run"
    process = started(2, "--run", run, "--iterations", 10**9)
    wait_for(run / "best.pt", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=seconds(30))
    assert err.count("SIGINT: stopping after this iteration and saving") == 1
    assert not said(err)
    assert (
        out.count("interrupted at iteration") == out.count(f"resume with: python -m kfo_ext train --resume {run}") == 1
    )
    training = [record for record in read_metrics(run / "metrics.jsonl") if not is_validation(record)]
    assert checkpoint.load(run / "last.pt")["progress"]["iteration"] == len(training)


FAILING = """
from kfo_ext import cli
from kfo_ext.trainer import loop
step = loop.Trainer._step
def failing(self, *arguments):
    if self.ranks.rank == 1 and self.progress.iteration == 3:
        raise OSError("the disk is full")
    step(self, *arguments)
loop.Trainer._step = failing
cli.main()
"""


def test_a_failing_rank_ends_all_with_one_message(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    process = torchrun(2, "--", tmp_path / "failing.py", *TRAIN, "--run", tmp_path / "run")
    _, err = process.communicate(timeout=seconds(60))
    assert process.returncode != 0
    assert said(err) == ["kfo: the disk is full"]
    checkpoint.load(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--run: expected the folder in which a restart (--max-restarts) finds the run, got none"),
        (["--run", "run", "--seed", "1"], "run: already holds a run with seed 0, expected 1 to go on with after a"),
    ],
)
def test_a_run_that_a_restart_could_not_go_on_with_is_refused(options, message, kfo, tmp_path, monkeypatch):
    assert kfo(*TRAIN, "--run", "run", "--iterations", 1)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    code, _, err = kfo(*TRAIN, "--iterations", 1, *options)
    assert code == 2
    assert f"kfo: {message}" in err
