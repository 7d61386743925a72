"""The time of each piece of a CPU kernel, relative to the multiply-adds of one core; or of two commits in turn.

    python bench/cpu_pieces.py --out cpu_pieces.json
    python bench/cpu_pieces.py --against COMMIT --out cpu_pieces_against.json

compiles bench/cpu_pieces.cpp with csrc/cpu of this tree, and with that of the commit. Measurements use one thread. The
pieces run in turn, each followed by its twin of the other commit, and the least time of each counts: on a shared
machine it is the undisturbed one. The turns decide which cache holds the operands. A Markdown table is written beside
the JSON file.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import setup as build  # the flags of the kernels; it lies beside bench/
from kfo_ext.bench.result import Row, facts_of, provenance, write_result
from kfo_ext.bench.timing import samples_of, wall_clock
from kfo_ext.ops import library

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("conv2d_kernels.cpp", "fma_kernels.cpp", "thread_scratch.cpp")  # transform_kernels.cpp is included
SAMPLE = 2e-4  # s
PEAK = "multiply-adds in registers"


class Piece(NamedTuple):
    """A piece to time by run(calls)."""

    name: str
    multiply_adds: float  # of one call; 0: it only moves data
    run: Callable[[int], None]


def numbers(count: int, what: str) -> Callable[[str], tuple[int, ...]]:
    """A parser of a command line's argument: `count` positive integers separated by commas."""

    def parse(text: str) -> tuple[int, ...]:
        fields = text.split(",")
        if len(fields) != count or not all(field.isdecimal() and int(field) for field in fields):
            raise argparse.ArgumentTypeError(f"expected {what}, {count} positive integers, got {text!r}")
        return tuple(int(field) for field in fields)

    return parse


def compiled(isa: str, csrc: Path, out: Path) -> ctypes.CDLL:
    """The pieces of a csrc folder as a library, compiled as setup.py would."""
    cpu = csrc / "cpu"
    sources = [Path(__file__).with_suffix(".cpp"), *(cpu / name for name in SOURCES)]
    flags = f"{build.HOST} {build.ISAS[isa]} -DKFO_ISA={isa} -I{shlex.quote(str(cpu))} -I{shlex.quote(str(csrc))}"
    command = [
        *shlex.split(build.toolchain.compiler()[0]),
        *shlex.split(flags),
        "-shared",
        *map(str, sources),
        "-o",
        str(out),
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(out))
    library.kfo_piece_name.restype = ctypes.c_char_p
    library.kfo_piece_multiply_adds.restype = ctypes.c_double
    library.kfo_piece_run.argtypes = ctypes.c_int, ctypes.c_int64
    return library


def csrc_of(commit: str, folder: Path) -> Path:
    """The csrc folder of a commit, unpacked into `folder`."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "csrc"], check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "csrc"


def full_name(commit: str) -> str:
    """The full name of a commit given on the command line."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise argparse.ArgumentTypeError(f"expected a commit of this repository, got {commit!r}")
    return found.stdout.strip()


def pieces_of(library: ctypes.CDLL, case: tuple[int, ...]) -> list[Piece]:
    """The pieces of a problem (B, p, q) or of a layer (images, size, channels, out channels, stride)."""
    prepare = library.kfo_transform_pieces if len(case) == 3 else library.kfo_conv2d_pieces
    prepare(*map(ctypes.c_int64, case))

    def run(number: int) -> Callable[[int], None]:
        return lambda calls: library.kfo_piece_run(number, calls)

    return [
        Piece(library.kfo_piece_name(i).decode(), library.kfo_piece_multiply_adds(i), run(i))
        for i in range(library.kfo_pieces())
    ]


def seconds(piece: Piece, calls: int) -> float:
    """Seconds per call, of `calls` calls in a row."""
    return wall_clock(lambda: piece.run(calls), 1) / calls


def measure(case: tuple[int, ...], libraries: list[ctypes.CDLL], rounds: int) -> Iterator[Row]:
    """A row for each piece: microseconds, share of the peak, and the ratio of its time to the other commit's."""
    here, *other = ({piece.name: piece for piece in pieces_of(library, case)} for library in libraries)
    turns = {(name, of is here): of[name] for name in here for of in (here, *other) if name in of}
    twins = {(name, False): (name, True) for name, ours in turns if not ours}
    found = samples_of(turns, rounds, SAMPLE, seconds, twins)
    times = {turn: min(samples) for turn, (samples, _) in found.items()}
    peak = here[PEAK].multiply_adds / min(time for (name, _), time in times.items() if name == PEAK)
    for name, piece in here.items():
        time = times[name, True]
        row: Row = {"piece": name, "microseconds": 1e6 * time, "gflop_per_s": 2e-9 * piece.multiply_adds / time}
        row["share_of_peak"] = piece.multiply_adds / time / peak
        if (name, False) in times:
            row["of_the_other"] = time / times[name, False]
        yield row


def markdown(result: dict[str, object]) -> str:
    """A table for each problem and layer."""
    settings = result["settings"]
    against = settings["against"]
    lines = [
        f"Made by `python bench/{result['command']}` on {result['processor']}, {provenance(result)}; "
        f"{settings['isa']}, float32, one thread; the least of {settings['rounds']} rounds. The "
        "share is that of the multiply-adds in registers in the same rounds; what has no rate only moves data; "
        "(transposed): of the problem Y^T = L^T G^T R."
        + (f" The last column: the time as a share of that at commit {against[:12]}." if against else ""),
    ]
    for case in result["cases"]:
        lines += ["", f"## {case['name']}", ""]
        lines += [f"| piece | time | GFLOP/s | share of the peak |{' of the other |' if against else ''}"]
        lines += [f"|---|---|---|---|{'---|' if against else ''}"]
        for row in case["pieces"]:
            rate = f"{row['gflop_per_s']:.0f} | {row['share_of_peak']:.2f}" if row["gflop_per_s"] else " | "
            other = f" {row['of_the_other']:.2f} |" if "of_the_other" in row else " |" if against else ""
            lines.append(f"| {row['piece']} | {row['microseconds']:.2f} us | {rate} |{other}")
    return "\n".join([*lines, ""])


def name_of(case: tuple[int, ...]) -> str:
    """The title of a problem or layer."""
    if len(case) == 3:
        B, p, q = case
        return f"Transform, (B, p, q) = ({B}, {p}, {q})"
    images, size, channels, out, stride = case
    return f"Convolution, {images} images of {size} x {size} x {channels}, {out} channels out, stride {stride}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    problem, layer = numbers(3, "B,p,q"), numbers(5, "images,size,channels,out channels,stride")
    parser.add_argument("--problems", nargs="*", type=problem, default=[(32, 32, 9), (1, 32, 1), (1, 5, 32)])
    parser.add_argument("--layers", nargs="*", type=layer, default=[(10, 14, 32, 32, 2), (10, 32, 32, 32, 1)])
    parser.add_argument("--isa", choices=library.supported_isas(), help="default: the best one here")
    parser.add_argument("--against", metavar="COMMIT", type=full_name, help="whose csrc to time in the same rounds")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    options.isa = options.isa or library.cpu_isa()
    facts, cases = facts_of(options), []
    with tempfile.TemporaryDirectory() as scratch:
        libraries = [compiled(options.isa, ROOT / "csrc", Path(scratch, "here.so"))]
        if options.against:
            libraries.append(compiled(options.isa, csrc_of(options.against, Path(scratch)), Path(scratch, "other.so")))
        for case in [*options.problems, *options.layers]:
            rows = list(measure(case, libraries, options.rounds))
            cases.append({"name": name_of(case), "case": case, "pieces": rows})
    result = facts | {"cases": cases}
    print(markdown(result))
    if options.out:
        write_result(options.out, result, markdown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
