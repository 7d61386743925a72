"""The CUDA kernels compiled as plain C++, one fiber per thread, against float64, plainly and under sanitizers.

No GPU is needed. Shared memory and every output start as NaN, a thread that misses a barrier is an error, and an
asynchronous copy lands when it is waited for. AddressSanitizer and UBSan watch memory, ThreadSanitizer missing barriers
and blocks that share an address. `make test` runs without sanitizers, `make sanitize` with them.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from deadlines import seconds

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
ROUNDS = "12"
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-fsanitize=thread"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


PROGRAMS = ("kernels_test", "batch_norm_test", "conv2d_test")


@functools.cache
def fixed_addresses() -> list[str]:
    """Starts a command without random addresses, where that is allowed: ThreadSanitizer gives up at some of them."""
    start = ["setarch", platform.machine(), "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*start, "true"], capture_output=True).returncode == 0
    return start if allowed else []


def compile_and_run(
    csrc: Path, folder: Path, flags: list[str], what: str, source: str = "kernels_test"
) -> subprocess.CompletedProcess:
    program = folder / source
    host = HERE / "cuda_host"
    # Kernels read 16 bytes of T at once, which device compilers take as it is meant.
    options = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", *flags]
    includes = ["-I", str(csrc), "-I", str(host), "-include", str(host / "host_device.h")]
    line = ["g++", *options, *includes, str(host / f"{source}.cpp"), "-o", str(program)]
    subprocess.run(line, check=True, timeout=seconds(600))
    # Leaks are not what is looked for, and looking for them needs ptrace, which may be denied.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [*fixed_addresses(), str(program), what]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds(600))


@pytest.mark.parametrize("source", PROGRAMS)
@pytest.mark.parametrize(
    ("flags", "what"),
    [
        pytest.param([], ROUNDS, id="plain"),
        pytest.param(MEMORY, ROUNDS, id="memory", marks=pytest.mark.breaks),
        pytest.param(RACES, "smallest", id="races", marks=pytest.mark.breaks),
    ],
)
def test_kernels_equal_float64(flags, what, source, tmp_path):
    done = compile_and_run(CSRC, tmp_path, flags, what, source)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "comparisons, worst error" in done.stdout


# Each breaks one line of a kernel; the run must fail for the reason given, or the tests above prove nothing.
WRONG_VALUE, COPIES, OVERFLOW, RACE = "FAIL", "asynchronous copies", "heap-buffer-overflow", "data race"
LEFT = "a thread left before a barrier"
MISALIGNED = "a misaligned asynchronous copy"  # whose address comes from memory that nobody has written yet
FLAGS = {WRONG_VALUE: [], COPIES: [], LEFT: [], MISALIGNED: [], OVERFLOW: MEMORY, RACE: RACES}
BREAKS = {
    "factor": ("transform_double_backward.cuh", "times_transposed(S, L)", "times_transposed(M, L)", WRONG_VALUE),
    "order": ("transform_backward.cuh", "sum_inner(G, M)", "sum_inner(M, G)", WRONG_VALUE),
    "edge": ("tiled.cuh", "index < size && k < depth", "k < depth", OVERFLOW),
    "sum": ("sum.cuh", "i < count", "i < count - 1", WRONG_VALUE),
    "shared sum's parts": ("products.cuh", "1 << log2 >> 1; lanes", "1 << log2 >> 2; lanes", WRONG_VALUE),
    "shared sum's repeats": ("products.cuh", "share.index & (repeats - 1)", "0", WRONG_VALUE),
    "shared sum's warp": ("products.cuh", "log2 == 0 && !there", "!there", LEFT),
    "shared sum's writer": ("products.cuh", "!there || share.index", "!there", RACE),
    "wait": ("block.cuh", "    __pipeline_wait_prior(0);\n", "", COPIES),
    "commit": ("block.cuh", "    __pipeline_commit();\n", "", COPIES),
    "barrier": ("transform_double_backward.cuh", "0b01010000", "0b01000000", RACE),
    "barrier of a tile": ("tiled.cuh", "      __syncthreads();\n      slab.advance", "      slab.advance", RACE),
    "barrier of the results": ("block.cuh", "    }\n    __syncthreads();\n  }", "    }\n  }", RACE),
    "entry": ("work.cuh", "<= static_cast", "< static_cast", WRONG_VALUE),
    "longer chunks": ("work.cuh", "min(chunk, entry.longer)", "0", WRONG_VALUE),
    "group of a row": ("products.cuh", "job.kind == kLeft ?", "job.kind == kRight ?", WRONG_VALUE),
    "rows of a tile": ("products.cuh", "i0 + u * row_tiles >= job.rows ||", "", RACE),
    "blocks": ("work.cuh", "entry.partials + int64_t{block} *", "entry.partials + 0 *", RACE),
    "lane's factor": ("transform_lanes.cuh", "factor(R, k, lanes.i), n)", "factor(R, lanes.i, k), n)", WRONG_VALUE),
    "lanes' rows of N": ("transform_lanes.cuh", "N, 0, n);\n    __syncwarp();", "N, 0, n);", RACE),
    "lanes' next N": ("transform_lanes.cuh", "reads\n    __syncwarp();", "reads", RACE),
    "lanes' rows of M": ("transform_lanes.cuh", "    __syncwarp();  // M is there, and dY read\n", "", RACE),
    "lanes' next M": ("transform_lanes.cuh", "    __syncwarp();  // M is read\n", "", RACE),
    "lanes' rows of dY": ("transform_lanes.cuh", "    __syncwarp();  // dY is read\n", "", RACE),
    "lanes' rows of all": ("transform_lanes.cuh", "    __syncwarp();  // M, S, N and K are there\n", "", RACE),
    "lanes' next rows": ("transform_lanes.cuh", "    __syncwarp();  // G, S, N, K and M are read\n", "", RACE),
    "lanes' results": ("transform_lanes.cuh", "  __syncthreads();\n  lanes.copy_out(kY", "  lanes.copy_out(kY", RACE),
    "lanes' copies": ("lanes.cuh", "    __pipeline_wait_prior(0);\n", "", COPIES),
    "lanes' commit": ("lanes.cuh", "    __pipeline_commit();\n", "", COPIES),
    "lanes' barrier": ("lanes.cuh", "prior(0);\n    __syncthreads();", "prior(0);", RACE),
    "lanes' zeros": ("lanes.cuh", "j = row < rows ? q : 0; j < kQ", "j = kQ; j < kQ", WRONG_VALUE),
    "lanes' edge": (
        "lanes.cuh",
        "    if (lane >= p) return;\n    T* to = shared() + place",
        "    T* to = shared() + place",
        RACE,
    ),
    "lanes' columns of dR": ("lanes.cuh", "if (first + c < p) to[c]", "to[c]", RACE),
    "lanes' sum of dR": ("lanes.cuh", "w < warps; ++w", "w + 1 < warps; ++w", WRONG_VALUE),
    "lanes' sum of dL": ("lanes.cuh", "part < kWarps * groups_", "part + 1 < kWarps * groups_", WRONG_VALUE),
    "lanes' groups": ("lanes.cuh", "row = group_ + step", "row = step", WRONG_VALUE),
    "lanes' bias": ("lanes.cuh", "bias[e - work_.entry.by_p.quotient(row) * p * q]", "bias[e % q]", WRONG_VALUE),
    "batch norm chunks": (
        "batch_norm_block.cuh",
        "chunk < args_.chunks; chunk += kSlices",
        "chunk < 1; chunk += kSlices",
        WRONG_VALUE,
    ),
    "batch norm means": ("batch_norm.cuh", "n * (off * off - rest * rest)", "0 * off", WRONG_VALUE),
    "batch norm edge": (
        "batch_norm_block.cuh",
        "if (i < count_) out.at[i] = data[i]",
        "out.at[i] = data[i]",
        OVERFLOW,
    ),
    "batch norm slices": ("batch_norm_block.cuh", "slice <= kSlices", "slice < kSlices", WRONG_VALUE),
    "batch norm merge": (
        "batch_norm_block.cuh",
        "shared[count + i] = total;\n    }\n    __syncthreads();",
        "shared[count + i] = total;\n    }",
        RACE,
    ),
    "batch norm next rows": ("batch_norm_block.cuh", "row + kStep < last", "row + kStep < end_", OVERFLOW),
    "batch norm rows left": (
        "batch_norm_block.cuh",
        "for (; row < end_; row += kBatchNormLanes) {\n        Values values[1]",
        "for (; row < begin_; row += kBatchNormLanes) {\n        Values values[1]",
        WRONG_VALUE,
    ),
    "batch norm blocks": ("batch_norm.h", "numeric_limits<int32_t>", "numeric_limits<int64_t>", WRONG_VALUE),
    "batch norm mask": ("batch_norm.cuh", "relu_ && z(i, d) <= 0", "relu_ && z(i, d) >= 0", WRONG_VALUE),
    "batch norm barrier": ("batch_norm.cuh", "total / n; });\n  __syncthreads();", "total / n; });", RACE),
    "batch norm reuse": ("batch_norm.cuh", "mean = block.kept(0);\n  __syncthreads();", "mean = block.kept(0);", RACE),
    "convolution tap": ("conv2d.h", "first_tap = phase + (taps - 1) * a.stride", "first_tap = phase", WRONG_VALUE),
    "convolution depth": (
        "conv2d_gather.cuh",
        "k < kDepth; k += kWidth",
        "k + kWidth < kDepth; k += kWidth",
        WRONG_VALUE,
    ),
    "convolution slabs": ("conv2d_gather.cuh", "(slab & 1) * Tile::kPixelSlab", "0", RACE),
    "convolution wait": ("conv2d_gather.cuh", "      __pipeline_wait_prior(0);\n", "", COPIES),
    "convolution commit": ("conv2d_gather.cuh", "    __pipeline_commit();\n", "", COPIES),
    "convolution barrier": ("conv2d_gather.cuh", "prior(0);\n      __syncthreads();", "prior(0);", RACE),
    "convolution table": ("conv2d_gather.cuh", "first));\n      __syncthreads();", "first));", MISALIGNED),
    "convolution tiles": (
        "conv2d_gather.cuh",
        "      __syncthreads();  // the next tile",
        "      // the next tile",
        RACE,
    ),
    "convolution image edge": (
        "conv2d_tile.cuh",
        "(pixel.column() + static_cast<unsigned>(column) < static_cast<unsigned>(columns))",
        "true",
        WRONG_VALUE,
    ),
    "convolution image end": (
        "conv2d_tile.cuh",
        "(pixel.row() + static_cast<unsigned>(row) < static_cast<unsigned>(rows))",
        "true",
        OVERFLOW,
    ),
    "convolution channels": ("conv2d_tile.cuh", "if (v + w < count) to", "to", OVERFLOW),
    "convolution weights": ("conv2d_gather.cuh", "n < left", "true", OVERFLOW),
    "convolution pixels": ("conv2d_gather.cuh", "if (row < rows) write", "write", WRONG_VALUE),
    "weight gradient splits": (
        "conv2d_weight.cuh",
        "split < args.splits; ++split",
        "split + 1 < args.splits; ++split",
        WRONG_VALUE,
    ),
    "weight gradient pixels": ("conv2d_weight.cuh", "p < left", "true", OVERFLOW),
    "weight gradient rows": ("conv2d_weight.cuh", "if (row < rows) write", "write", RACE),
    "weight gradient slabs": ("conv2d_weight.cuh", "(slab & 1) * kDepth * kThreads", "0", RACE),
    "weight gradient table": ("conv2d_weight.cuh", "index % (2 * kThreads)", "index % kThreads", RACE),
    "weight gradient blocks": ("conv2d_weight.cuh", "task * args.splits + split) * size_", "task) * size_", RACE),
    "weight gradient barrier": ("conv2d_weight.cuh", "prior(0);\n      __syncthreads();", "prior(0);", MISALIGNED),
    "weight gradient sums": (
        "conv2d_weight.cuh",
        "  __syncthreads();\n  if (first + across",
        "  if (first + across",
        RACE,
    ),
}
# The program that runs the kernels of a file, by how its name begins.
PROGRAM_OF = {"batch_norm": "batch_norm_test", "conv2d": "conv2d_test"}


@pytest.mark.breaks
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_is_caught(name, tmp_path):
    file, right, wrong, reason = BREAKS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert text.count(right) == 1
    (csrc / "cuda" / file).write_text(text.replace(right, wrong))
    source = next((PROGRAM_OF[start] for start in PROGRAM_OF if file.startswith(start)), "kernels_test")
    done = compile_and_run(csrc, tmp_path, FLAGS[reason], "smallest", source)
    assert done.returncode != 0
    assert reason in done.stdout + done.stderr
