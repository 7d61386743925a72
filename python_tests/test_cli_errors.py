"""What the command line does with what it cannot use: options, streams, names; one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import seconds

from kfo_ext import demo
from kfo_ext.bench import cases, names, points, providers
from kfo_ext.runs import RunFolder
from kfo_ext.trainer import Config
from kfo_ext.trainer.listing import listed

TINY = ["--dataset", "sinusoid", "--hidden", "4", "--steps", "1", "--meta-batch", "2"]
TINY += ["--iterations", "2", "--validation-every", "1", "--validation-tasks", "2"]


def refused(answer: tuple[int, str, str], *parts: str) -> bool:
    code, _, err = answer
    assert code == 2, err
    assert err.startswith("kfo: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(part in err for part in parts), err
    return True


def start(code: str, **options) -> subprocess.CompletedProcess:
    """Runs Python code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(120), **options)


def test_help_and_version_need_no_torch():
    code = """
import sys
from kfo_ext.__main__ import main
commands = "train eval compare runs plot export demo doctor bench".split()
for line in ["", "-h", "--help", "--version", "train/--help", *(f"{command}/-h" for command in commands)]:
    sys.argv = ["kfo", *filter(None, line.split("/"))]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
    assert "torch" not in sys.modules and "matplotlib" not in sys.modules, line
"""
    done = start(code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "kfo 0." in done.stdout
    assert "--meta-lr-half-life" in done.stdout
    assert "reference | zero_head" in done.stdout
    assert "learn2learn" in done.stdout


def test_choices_are_those_that_there_are():
    assert tuple(points.GROUPS) == names.GROUPS
    assert tuple(providers.PROVIDERS) == names.PROVIDERS
    assert cases.ORDERS == names.ORDERS
    assert set(points.VALUES) == set(points.QUICK_VALUES) == set(names.AXES)


WHOLE = [option.name for option in listed() if option.option.kind is int and option.name in Config().values]


@pytest.mark.parametrize("name", WHOLE)
def test_integers_beyond_64_bits_in_train(name, kfo, tmp_path):
    refused(kfo("train", f"--{name.replace('_', '-')}", 10**20), name, str(10**20))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"{name}: expected at most"):
        Config(**{name: 10**20})


@pytest.mark.parametrize(
    "line",
    [f"eval r --{name}" for name in ("tasks", "seed", "threads", "steps", "shots", "queries", "ways")]
    + ["demo --tasks"]
    + [f"bench --{name}" for name in ("repeats", "threads")],
)
def test_integers_beyond_64_bits_elsewhere(line, kfo):
    refused(kfo(*line.split(), 10**20), f"Invalid value for '{line.split()[-1]}'", str(10**20))
    refused(kfo(*line.split(), -(10**20)), f"Invalid value for '{line.split()[-1]}'")


@pytest.mark.parametrize("line", ["train --time-budget", "demo --time-budget", "bench --budget", "bench --limit"])
def test_seconds_that_are_no_number(line, kfo, tmp_path):
    refused(kfo(*line.split(), "nan"), f"Invalid value for '{line.split()[-1]}'", "nan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "value"),
    [("train --inner-lr", "abc"), ("train --steps", "1.5"), ("eval r --tasks", "x"), ("bench --limit", "soon")],
)
def test_a_value_that_is_no_number_is_named(line, value, kfo):
    refused(kfo(*line.split(), value), f"Invalid value for '{line.split()[-1]}'", repr(value))


@pytest.mark.parametrize("name", ["layers", "hidden-layers"])
def test_too_many_layers(name, kfo):
    refused(kfo("train", f"--{name}", 1_000_000), f"{name.replace('-', '_')}: expected at most 1000, got 1000000")


def test_too_many_threads(kfo, monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda number: pytest.fail(f"{number} threads"))
    refused(kfo("train", *TINY, "--threads", 1_000_000), "threads: expected at most 1024, got 1000000")
    refused(kfo("train", *TINY, "--workers", 1_000_000), "workers: expected at most 1024, got 1000000")
    refused(kfo("eval", "r", "--threads", 1_000_000), "'--threads'", "1000000")
    refused(kfo("bench", "--threads", 1_000_000), "'--threads'", "1000000")


@pytest.mark.parametrize("line", ["--hidden 10000000", f"--hidden {2**62}", "--dataset sinusoid --hidden 100000000"])
def test_too_little_memory_for_the_options(line, kfo, tmp_path):
    refused(kfo("train", "--iterations", 1, *line.split()), "not enough memory for these options", "--hidden")
    assert not list(tmp_path.iterdir())


def test_memory_errors_of_python_and_other_errors(kfo, monkeypatch):
    def fails_with(error):
        def run(*args, **kwargs):
            raise error

        monkeypatch.setattr(demo, "run", run)
        return kfo("demo")

    refused(fails_with(MemoryError()), "not enough memory for these options (MemoryError)")
    refused(fails_with(RuntimeError("can't start new thread")), "not enough memory", "--workers")
    refused(fails_with(OSError(28, "No space left on device", "a/b")), "No space left on device: 'a/b'")
    refused(fails_with(ValueError("several\nlines")), "kfo: several lines")
    with pytest.raises(RuntimeError, match="a fault of ours"):
        fails_with(RuntimeError("a fault of ours"))
    monkeypatch.undo()


def test_demo_refuses_before_it_trains(kfo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "_all", lambda *args: pytest.fail("trains"))
    for tasks in (1, 0, -5):
        refused(
            kfo("demo", "--tasks", tasks),
            f"tasks: expected at least 2, for an interval, and at most 64 bits, got {tasks}",
        )
    refused(kfo("demo", "--time-budget", "inf"), "time_budget: expected seconds above 0, got inf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [b"a$\\frac{$b", b"a\xffb", b"_a", "字\t💥".encode(), b"a\nb"], ids=repr)
def test_names_of_runs(name, kfo, recwarn):
    run = os.fsdecode(name)
    code, out, err = kfo("train", "--run", run, *TINY)
    assert (code, err) == (0, "")
    assert "curve.png" in out
    assert RunFolder(run).curve.read_bytes().startswith(b"\x89PNG")
    code, out, err = kfo("eval", run, "--tasks", 3)
    assert (code, err) == (0, "")
    assert "written: " in out
    assert kfo("train", "--resume", run, "--iterations", 3)[0] == 0
    refused(kfo("train", "--run", run, *TINY), "already holds a run")
    assert not recwarn.list


def test_an_output_of_few_characters(tmp_path):
    done = start(
        "from kfo_ext.streams import echo, open_streams; open_streams(); echo('1 ± 2')",
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stdout) == (0, "1 \\xb1 2\n")


SAY = "from kfo_ext.cli import main; import sys; sys.argv = ['kfo', {}]; main()"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_streams(tmp_path):
    for arguments in ("'--version'", "'--help'"):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-c", SAY.format(arguments)]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=seconds(60))
            assert done.returncode == 2
            assert done.stderr.startswith("kfo: ") and done.stderr.endswith("No space left on device\n")
            assert done.stderr.count("\n") == 1
            assert subprocess.run(command, stdout=full, stderr=full, timeout=seconds(60)).returncode == 2


def test_a_pipe_that_nobody_reads(tmp_path):
    for arguments in ("'--version'", "'--help'", f"'runs', {str(tmp_path)!r}"):
        ours, theirs = os.pipe()
        os.close(ours)
        command = [sys.executable, "-c", SAY.format(arguments)]
        done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=seconds(60))
        os.close(theirs)
        assert (done.returncode, done.stderr) == (141, "")


def without_streams(command: list[str], folder: Path, *numbers: int) -> int:
    closed = " ".join(f"{number}>&-" for number in numbers)
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], cwd=folder, timeout=seconds(120)
    ).returncode


def test_closed_streams_go_to_no_file(tmp_path):
    code = """
import os
from kfo_ext.streams import complain, echo, open_streams, settle
open_streams()
with open("file", "w") as file:
    assert file.fileno() > 2
    os.write(2, b"for nobody")
    echo("for nobody")
    complain("for nobody")
    settle()
"""
    for numbers in ((1,), (2,), (1, 2), (0, 1, 2)):
        assert without_streams([sys.executable, "-c", code], tmp_path, *numbers) == 0
        assert (tmp_path / "file").read_text() == ""


def test_training_without_standard_error(tmp_path):
    command = [sys.executable, "-m", "kfo_ext", "train", "--run", "run", *TINY]
    assert without_streams(command, tmp_path, 1, 2) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith('{"iteration"') for line in lines)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("torch", "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"),
        # Some extension modules do this to an exception while they are being imported.
        (
            "torch",
            "try: os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\nexcept BaseException: raise AttributeError",
        ),
        ("typer", "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)"),
    ],
    ids=["torch", "swallowed", "typer"],
)
def test_ctrl_c_during_an_import(module, code, tmp_path):
    (tmp_path / f"{module}.py").write_text(f"import os, signal, time\n{code}\n")
    main = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['kfo', 'train']; "
    done = start(main + "from kfo_ext.__main__ import main; main()")
    assert (done.returncode, done.stderr) == (130, "kfo: aborted\n")
