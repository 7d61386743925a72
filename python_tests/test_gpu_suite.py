"""What runs on a CUDA machine, without one: limits hold, what fails is named, summary and tar are there."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from deadlines import seconds

from bench import gpu_libraries, gpu_logs, gpu_parts, gpu_suite
from bench.gpu_parts import Part, Table
from kfo_ext import cli

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


def shell(name: str, script: str, limit: int = 60, **options) -> Part:
    return Part(name, limit, ["sh", "-c", script], **options)


def run(folder: Path, *stages: list[Part], budget: float = 100) -> tuple[bool, dict[str, gpu_suite.Result], str]:
    """Whether all passed, how each part ended, and the summary, which lies in the tar and beside it."""
    suite = gpu_suite.Suite(list(stages), folder / "out", folder / "work", budget, "c0ffee")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        passed = suite.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return passed, suite.results, summary_of(folder / "out")


def summary_of(out: Path) -> str:
    # SIGKILL may come while a file is written anew, beside the last whole one.
    there = sorted(path.name for path in out.iterdir() if path.suffix != ".part")
    assert there == ["gpu_suite.tar.gz", "summary.txt"]
    with tarfile.open(out / "gpu_suite.tar.gz") as tar:
        inside = tar.extractfile("gpu_suite/summary.txt").read().decode()
    text = (out / "summary.txt").read_text()
    assert text == inside and len(text) < 6000
    return text


def names(stages: gpu_parts.Stages) -> list[str]:
    return [part.name for stage in stages for part in stage]


def test_gpu_tests_skip_without_a_device():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        str(ROOT / "python_tests/gpu"),
    ]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "KFO_TEST_DEVICE": "cuda"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds(120))
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout
    assert "skipped" in last and "passed" not in last and "deselected" not in last
    assert "no CUDA device: torch.cuda.is_available() is false" in done.stdout


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_limits_add_up_to_the_budget_at_most(device, tmp_path):
    stages = Table(device, tmp_path).main()
    assert sum(max(part.limit for part in stage) for stage in stages) <= gpu_suite.BUDGET - gpu_suite.RESERVE
    assert gpu_suite.BUDGET <= 480
    assert names(stages) == [
        "libraries", "smoke", "native_tests", "memcheck", "racecheck", "triton_tests", "truths", "transform",
        "meta_omniglot", "meta_cifar", "conv_forms", "profile", "ncu", "precision", "gpu_memory",
    ]  # fmt: skip
    every = names([*stages, *Table(device, tmp_path).extras()])
    assert len(set(every)) == len(every)


def test_parts_of_a_stage_run_side_by_side_and_stages_in_turn(tmp_path):
    meet = "touch {}; while [ ! -e {} ]; do sleep 0.05; done; echo {}"
    a, b = tmp_path / "a", tmp_path / "b"
    stage = [shell("one", meet.format(a, b, "first")), shell("two", meet.format(b, a, "second"))]
    passed, results, text = run(
        tmp_path, stage, [shell("three", f"test -e {a} && echo $KFO_COMMIT $X", env={"X": "x"})]
    )
    assert passed, text
    assert [results[name].detail for name in results] == ["first", "second", "c0ffee x"]
    assert text.startswith("gpu_suite: 3 of 3 parts passed in ") and "c0ffee" in text.splitlines()[0]


def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "GRACE", 1)
    hangs = (
        f"trap '' INT; sleep 600 & echo $! >{tmp_path}/child; echo is off by 9, my case is off by 9; wait; sleep 600"
    )
    start = time.monotonic()
    passed, results, text = run(
        tmp_path, [shell("hangs", hangs, 3), shell("beside", "echo well")], [shell("next", "echo on")]
    )
    assert time.monotonic() - start < seconds(20)
    assert not passed and results["next"] == results["next"]._replace(status="passed", detail="on")
    assert results["beside"].status == "passed"
    assert results["hangs"].status == "FAILED" and results["hangs"].detail.startswith("out of time after 3 s; first: ")
    assert gone(tmp_path / "child")
    assert "2 of 3 parts passed" in text


def gone(file: Path) -> bool:
    """Whether the process whose id is in the file has ended."""
    stat = Path("/proc", file.read_text().strip(), "stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_stage_has_what_those_before_it_left_and_takes_nothing_from_those_after(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_suite, "GRACE", 1)
    quick, slow, last = shell("quick", "true", 30), shell("slow", "true", 10), shell("last", "true", 20)
    run(tmp_path, [quick], [slow], [last], budget=55)
    given = [int(number) for number in re.findall("at most ([0-9]+) s", capsys.readouterr().out)]
    assert given[0] == 30 and 35 <= given[1] <= 40
    # All that there is, but for what it takes to pack.
    assert 35 <= given[2] <= 45
    _, results, text = run(tmp_path, [shell("first", "sleep 9", 5)], [last], budget=gpu_suite.RESERVE + 3)
    assert results["first"].detail.startswith("out of time after 3 s")
    assert results["last"].status == "left out" and "the 13 s are spent" in text


FAILING = """
import pytest
def test_right(): pass
@pytest.mark.parametrize("x", ["a b", "c"])
def test_wrong(x):
    assert x == "d", "this is why"
def test_other(): raise ValueError
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_the_first_failing_test_is_named(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_made_up.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", *workers]
    part = Part(
        "made_up", 60, [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path / "test_made_up.py")]
    )
    _, results, text = run(tmp_path, [part])
    expected = r"status 1; first: \S*test_made_up.py::test_wrong\[a b\] - AssertionError: this is why"
    assert re.match(expected, results["made_up"].detail), results
    assert "3 failed, 1 passed" in results["made_up"].detail and re.search(expected, text)


def test_a_test_that_failed_before_the_limit_is_named(tmp_path):
    """What is interrupted has the time to say why."""
    script = "trap 'echo FAILED a.py::test_b - because; exit 2' INT; echo 'a.py::test_b FAILED'; sleep 600 & wait"
    _, results, _ = run(tmp_path, [shell("made_up", script, gpu_suite.GRACE + 2)])
    assert results["made_up"].detail.startswith("out of time after 2 s; first: a.py::test_b - because")


@pytest.mark.parametrize(
    ("log", "first"),
    [
        ("[gw3] [ 12%] FAILED b.py::test_x[a, b] \nFAILED b.py::test_x[a, b] - so\n", "b.py::test_x[a, b] - so"),
        ("a/b.py::test_x[y] FAILED   [ 50%]\n", "a/b.py::test_x[y]"),
        ("========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n=========   at k\nx\n",
         "Invalid __global__ read of size 4 bytes"),
        ("native float32: Y of forward is off by 1e-3\n3 wrong\n", "native float32: Y of forward is off by 1e-3"),
        ("Traceback\n  File\ntorch.AcceleratorError: CUDA error: x\n\nmore\n", "torch.AcceleratorError: CUDA error: x"),
        ("one\ntwo\n\n", "two"),
        ("", "it printed nothing"),
    ],
)  # fmt: skip
def test_what_a_log_says_failed_first(log, first, tmp_path):
    (tmp_path / "log").write_text(log)
    assert gpu_logs.first_failure(gpu_logs.read(tmp_path / "log")) == first


def test_after_a_wrong_smoke_test_nothing_is_timed(tmp_path):
    stages = [shell("smoke", "exit 1")], [shell("tests", "true")], [shell("timing", "true", if_right=True)]
    _, results, _ = run(tmp_path, *stages)
    assert [results[name].status for name in ("smoke", "tests", "timing")] == ["FAILED", "passed", "left out"]


def test_a_program_that_is_not_there(tmp_path):
    passed, results, _ = run(tmp_path, [Part("ncu", 9, ["no-such-ncu"])], [shell("next", "true")])
    assert not passed and "no-such-ncu does not start: No such file" in results["ncu"].detail
    assert results["next"].status == "passed"


def test_the_summary_quotes_and_stays_short(tmp_path):
    loud = f"for i in $(seq 400); do echo '* native    {'x' * 200}'; done; echo no; false"
    _, _, text = run(tmp_path, [shell("table", "printf '* a    1\\nb 2\\n* c 3\\n'", show=r"\* ")], *(
        [shell(f"loud{i}", loud, show=r"\* ")] for i in range(15)
    ))  # fmt: skip
    assert "-- table\n* a 1\n* c 3\n" in text and text.endswith("the rest is in gpu_suite.tar.gz\n")
    assert all(f"loud{i} " in text for i in range(15))


def test_the_tar_stays_under_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "MOST_OF_TAR", 200_000)
    big = f"head -c 400000 /dev/urandom >{tmp_path}/work/big; echo small >{tmp_path}/work/small.json"
    run(tmp_path, [shell("writes", big)])
    with tarfile.open(tmp_path / "out" / "gpu_suite.tar.gz") as tar:
        assert {"gpu_suite/small.json", "gpu_suite/writes.log", "gpu_suite/summary.txt"} == set(tar.getnames())


KILLED = """
import json
import sys
from pathlib import Path
from bench.gpu_suite import Suite
from bench.gpu_parts import Part
folder, parts = Path(sys.argv[1]), json.loads(sys.argv[2])
Suite([[Part(*part)] for part in parts], folder / "out", folder / "work").run()
"""


def kill(folder: Path, number: signal.Signals, *parts: Part, after: float = 0) -> str:
    """The summary of a suite that gets a signal, so long after its part `long` has said that it has begun."""
    command = [sys.executable, "-c", KILLED, str(folder), json.dumps([part[:3] for part in parts])]
    log, summary, end = folder / "work" / "long.log", folder / "out" / "summary.txt", time.monotonic() + seconds(60)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as suite:
        try:
            while not (log.exists() and "begun" in log.read_text() and "running" in summary.read_text()):
                assert time.monotonic() < end
                time.sleep(0.05)
            time.sleep(after)
            suite.send_signal(number)
            suite.wait(seconds(30))
        finally:
            suite.kill()
    return summary_of(folder / "out")


LONG = "echo $$ >{}/child; echo begun; while :; do sleep 1; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_summary_and_tar_are_there_when_the_suite_is_killed(number, tmp_path):
    parts = shell("done", "echo well"), shell("long", LONG.format(tmp_path)), shell("last", "true")
    text = kill(tmp_path, number, *parts)
    assert re.search(r"^passed +done .* well$", text, re.MULTILINE)
    if number == signal.SIGKILL:
        assert re.search("^running +long ", text, re.MULTILINE)
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    else:
        assert gone(tmp_path / "child")
        assert f"stopped by {number.name} after" in text and re.search("^left out +last ", text, re.MULTILINE)


def test_a_suite_killed_while_it_waits_for_a_part_kills_that_too(tmp_path):
    # Interrupted after a second, which it ignores, and would be killed after five.
    text = kill(tmp_path, signal.SIGTERM, shell("long", f"trap '' INT; {LONG.format(tmp_path)}", 5), after=2)
    assert gone(tmp_path / "child")
    assert re.search("^FAILED +long .*(stopped by SIGTERM|out of time) after", text, re.MULTILINE)


def test_named_parts_run_alone_and_after_the_libraries(tmp_path):
    table = Table("cuda", tmp_path)
    assert names(gpu_suite.chosen(table, ["racecheck", "meta_jax", "smoke"])) == [
        "libraries",
        "smoke",
        "racecheck",
        "meta_jax",
    ]
    with pytest.raises(ValueError, match=r"PARTS: expected some of libraries, smoke.*, got 'tests'"):
        gpu_suite.chosen(table, ["tests"])


class Parsed(Exception):
    """A script has taken its arguments."""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_scripts_take_the_arguments_they_are_given(device, monkeypatch, tmp_path):
    true = argparse.ArgumentParser.parse_args

    def parse_args(parser, arguments):
        true(parser, arguments)
        raise Parsed

    no_arguments = argparse.ArgumentParser(), []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    table, parsed = Table(device, tmp_path), set()
    for part in [part for stage in [*table.main(), *table.extras()] for part in stage]:
        under = list(part.command[: part.command.index(sys.executable)])
        assert bool(under) == (
            device == "cuda" and part.name in ("ncu", "memcheck", "racecheck", "initcheck", "synccheck")
        )
        name, *arguments = part.command[len(under) + 1 :]
        if name.startswith("bench/"):
            with pytest.raises(Parsed):
                importlib.import_module(f"bench.{Path(name).stem}").main(arguments)
            parsed.add(Path(name).stem)
        elif arguments[:2] == ["kfo_ext", "bench"]:
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr("torch.cuda.is_available", lambda: True)
                patch.setattr("kfo_ext.bench.command.run", lambda settings, folder, echo: parse_args(*no_arguments))
                cli.app(arguments[1:], standalone_mode=False)
            parsed.add("kfo bench")
        else:
            assert arguments[0] == "pytest"
            assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("python_tests"))
    scripts = {"meta_peers", "precision", "conv_forms", "one_call", "sanitize_case", "meta_profile", "gpu_libraries"}
    assert parsed == {"kfo bench", *scripts}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Folders for what is carried and for the package, of which `gpu_libraries` knows no other."""
    monkeypatch.setattr(gpu_libraries, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(gpu_libraries, "PACKAGE", tmp_path / "package")
    for name in ("carried", "package"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_carried_binaries_are_taken_if_they_are_of_these_sources(tree):
    assert gpu_libraries.put_carried() == "nothing is carried"
    build = gpu_libraries.source_id()
    for name in ("_kfo_cpu.so", "_plan.so"):
        (tree / "carried" / name).write_bytes(b"\0" + build.encode())
    assert gpu_libraries.put_carried() == f"2 binaries of build {build}"
    assert sorted(path.name for path in (tree / "package").iterdir()) == ["_kfo_cpu.so", "_plan.so"]
    (tree / "package" / "_plan.so").unlink()
    (tree / "carried" / "_kfo_cpu.so").write_bytes(b"another build")
    assert "_kfo_cpu.so is not of build" in gpu_libraries.put_carried()
    assert not (tree / "package" / "_plan.so").exists()


def test_where_the_carried_do_not_load_they_are_built_for_the_gpu_alone(tree, monkeypatch, capsys):
    """With a fake nvidia-smi and a fake setup.py, which is what makes the libraries load."""
    for name, script in {
        "nvidia-smi": "echo A Fake GPU, 580.1",
        "python": f"echo $KFO_CUDA_ARCHITECTURES $* >{tree}/built",
    }.items():
        (tree / name).write_text(f"#!/bin/sh\n{script}\n")
        (tree / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tree), os.environ["PATH"]]))
    monkeypatch.setattr(gpu_libraries, "FACTS", gpu_libraries.FACTS[:1])
    monkeypatch.setattr(gpu_libraries.sys, "executable", str(tree / "python"))
    true = gpu_libraries.said

    def said(command):
        if gpu_libraries.LOADED in command:
            built = (tree / "built").exists()
            return built, "loaded" if built else "does not load"
        return (True, "90") if gpu_libraries.CAPABILITY in command else true(command)

    monkeypatch.setattr(gpu_libraries, "said", said)
    assert gpu_libraries.main([]) == 0
    assert (tree / "built").read_text() == "90 setup.py build_ext --inplace\n"
    printed = capsys.readouterr().out
    assert "nvidia-smi: A Fake GPU, 580.1\n" in printed and printed.endswith("built here: loaded\n")


def current(name: str) -> bool:
    """Whether the library is there, and of these sources: others would be compiled anew, for minutes."""
    library = ROOT / "kfo_ext" / name
    return library.exists() and gpu_libraries.source_id().encode() in library.read_bytes()


@pytest.mark.parametrize("there", ["3.12", "3.0"])
def test_what_is_carried(there, tmp_path):
    if not (current("_kfo_cpu.so") and current("_kfo_cuda.so")) or not (ROOT / ".git").exists():
        pytest.skip("needs both libraries as they are built from these sources, in a checkout")
    carry = tmp_path / "build" / "carry"
    env = {**os.environ, "PYTHON": sys.executable, "THERE": there, "CARRY": str(carry)}
    command = ["bash", str(BENCH / "gpu_carry.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds(200))
    assert done.returncode == 0, done.stdout + done.stderr
    libraries = {path.name for path in (carry / "kfo_ext").iterdir()}
    if f"no Python {there} here" in done.stdout:
        assert libraries == {"_kfo_cpu.so", "_kfo_cuda.so"}
    else:
        assert "as both libraries of build" in done.stdout
        assert libraries == {
            "_kfo_cpu.so",
            "_kfo_cuda.so",
            f"_plan.cpython-{there.replace('.', '')}-x86_64-linux-gnu.so",
        }
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?\n", (carry / "commit").read_text())
    assert not list((carry / "site").rglob("*.so"))
    for package in ("learn2learn", "expecttest"):
        # Not by find_spec: what `light_import` has imported in this process has no spec.
        assert PathFinder.find_spec(package) is None or (carry / "site" / package / "__init__.py").exists()
    assert re.search(r"MiB: \d+ MiB of 64$", done.stdout.strip())


@pytest.mark.parametrize(("setting", "expected"), [("", [80, 90, 100, 120]), ("90", [90]), ("80 90", [80, 90])])
def test_a_build_may_be_for_some_architectures_alone(setting, expected):
    command = [sys.executable, "-c", "import setup; print(setup.ARCHITECTURES)"]
    env = {**os.environ, "KFO_CUDA_ARCHITECTURES": setting}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds(60))
    assert done.stdout == f"{expected}\n", done.stderr


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", str(BENCH / "gpu_suite.sh"), str(BENCH / "gpu_carry.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds(60))
    assert done.returncode == 0, done.stdout
