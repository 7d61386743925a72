"""What `gpu_suite.py` runs: its parts in their order, how long each may take, and which of them run side by side.

Our own numbers come before what compiles for long, and native kernels before Triton's.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GPU_TESTS = "python_tests/gpu"
# Its own part: it takes most of the device's memory.
MEMORY_TESTS = f"{GPU_TESTS}/test_gpu_memory.py"
# On a CPU those alone: the others take minutes there.
QUICK_TESTS = [f"{GPU_TESTS}/test_gpu_{name}.py" for name in ("derivatives", "execution", "tasks")]
# Of a table of `meta_peers.py`, a line for each network and contender.
PEERS = r"\w+ kfo: |ours|learn2learn|jax"
# Of those of `kfo bench`, our operators and what is compiled.
TRANSFORM = r"tasks=|\* (native|triton)|  (torch-formulas-compile|jax)"


class Part(NamedTuple):
    """One command of the suite.

    limit: seconds
    env: what it adds to the environment
    show: the lines of its log that the summary quotes, as a regular expression for their start
    if_right: leave it out once the smoke test has failed
    """

    name: str
    limit: float
    command: Sequence[str]
    env: Mapping[str, str] = {}
    show: str = ""
    if_right: bool = False


Stages = list[list[Part]]


class Table:
    """Makes the parts.

    device: cuda; or cpu to rehearse, with less work and without the tools of CUDA
    work: folder that they write to
    """

    def __init__(self, device: str, work: Path) -> None:
        self.device, self.work = device, work
        self.on_cuda = device == "cuda"

    def main(self) -> Stages:
        """Those that run when none is named, stage after stage; those of one stage run side by side."""
        small = [] if self.on_cuda else ["--tasks", "2", "--steps", "2"]
        networks = ["omniglot_cnn2", "omniglot_cnn4", "cifar_fs_cnn2"] if self.on_cuda else ["omniglot_cnn2"]
        peers = ["--methods", "kfo", "--no-memory", "--truths", f"{self.work}/truths", *small]
        ours = [*peers, "--contenders", "ours_native", "ours_native_graph", "learn2learn"]
        return [
            [self.script("libraries", 60, "gpu_libraries")],
            [self.script("smoke", 25, "sanitize_case", "--backends", "native")],
            [
                self.tests("native_tests", 110, "not triton and not reduced_overhead", ignored=MEMORY_TESTS),
                self.sanitizer("memcheck", 110),
                self.sanitizer("racecheck", 110),
                self.tests("triton_tests", 110, "triton and not reduced_overhead", ignored=MEMORY_TESTS),
                # On the CPU meanwhile: the timings need not wait for what they are compared with.
                self.script("truths", 110, "meta_peers", *peers, "--networks", *networks, "--only-truths",
                            threads=4 if self.on_cuda else 1),
            ],
            [self.transform("transform", 40, "native,lists,gradients-on,torch-matmul,torch-formulas,learn2learn")],
            [self.timing("meta_omniglot", 60, "meta_peers", *ours, "--networks", *networks[:2], show=PEERS)],
            [self.timing("meta_cifar", 40, "meta_peers", *ours, "--networks", networks[-1], repeats=3, show=PEERS)],
            [
                self.timing("conv_forms", 40, "conv_forms", *small[:2], "--networks", *networks[::2],
                            show=r"### |\| layer|\| sum|- ours"),
            ],
            [
                self.timing("profile", 20, "meta_profile", *small, "--networks", networks[0], "--methods", "kfo",
                            repeats=3, show=r"### |\| (stage|conv|batch|trans|Python)"),
            ],
            [self.profiled("ncu", 30)],
            [
                self.timing("precision", 25, "precision", "--truths", f"{self.work}/truths",
                            *([] if self.on_cuda else ["--quick"]), show="kfo |maml "),
            ],
            [self.tests("gpu_memory", 20, "", [MEMORY_TESTS], processes=0)],
        ]  # fmt: skip

    def extras(self) -> Stages:
        """Those that run only where they are named: Triton's numbers, the slower sanitizers, what compiles for long."""
        jax = ["--contenders", "ours_native_graph", "jax_vmap", "jax_vmap_patches", "--networks", "omniglot_cnn2"]
        return [
            [self.transform("transform_triton", 60, "native,triton")],
            [self.sanitizer("initcheck", 60), self.sanitizer("synccheck", 60)],
            [self.tests("reduced_overhead", 90, "reduced_overhead")],
            [self.transform("transform_compiled", 90, "native,torch-formulas-compile,jax")],
            [self.timing("meta_jax", 90, "meta_peers", *jax, "--methods", "kfo", "--no-memory", show=PEERS)],
        ]

    def script(self, name: str, limit: int, file: str, *arguments: str, threads: int = 0) -> Part:
        """A script of this folder."""
        command = [sys.executable, f"bench/{file}.py", "--device", self.device, *arguments]
        return Part(name, limit, command, {"OMP_NUM_THREADS": str(threads)} if threads else {})

    def timing(self, name: str, limit: int, file: str, *arguments: str, repeats: int = 5, show: str) -> Part:
        """A script that measures, and writes what it found to a file."""
        out = ["--repeats", str(repeats), "--out", f"{self.work}/{name}.json"]
        return self.script(name, limit, file, *arguments, *out)._replace(show=show, if_right=True)

    def transform(self, name: str, limit: int, providers: str) -> Part:
        """`kfo bench` of the networks' parameters, for the tasks of one meta-iteration."""
        tasks = "16" if self.on_cuda else "2"
        command = [sys.executable, "-m", "kfo_ext", "bench", "--quick", "--device", self.device, "--axes", "tasks"]
        command += ["--tasks", tasks, "--groups", "CNN(2),CNN(4)", "--providers", providers, "--repeats", "15"]
        command += ["--budget", "2", "--limit", str(limit // 2), "--out", f"{self.work}/{name}"]
        return Part(name, limit, command, show=TRANSFORM, if_right=True)

    def tests(
        self, name: str, limit: int, chosen: str, files: Sequence[str] = (), *, ignored: str = "", processes: int = 5
    ) -> Part:
        """Tests of a device, of which the first twenty that fail end the part."""
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-rf", "-p", "no:cacheprovider", "-m", "gpu"]
        # A warning that only a GPU brings about is to be read, not to fail a test.
        command += ["-W", "default", "--maxfail", "20"]
        command += ["--timeout", "60"] if _installed("pytest_timeout") else []
        command += ["-n", str(processes if self.on_cuda else 1)] if processes and _installed("xdist") else []
        command += [f"--ignore={ignored}"] if ignored else []
        command += ["-k", chosen] if chosen else []
        command += files or ([GPU_TESTS] if self.on_cuda else QUICK_TESTS)
        return Part(name, limit, command, {"KFO_TEST_DEVICE": self.device, "OMP_NUM_THREADS": "1"})

    def sanitizer(self, tool: str, limit: int) -> Part:
        """The smoke test under a tool of compute-sanitizer, every tensor an allocation of its own."""
        under = [program("compute-sanitizer"), "--tool", tool, "--error-exitcode", "9"] if self.on_cuda else []
        part = self.script(tool, limit, "sanitize_case", "--backends", "native", threads=1)
        env = {**part.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return part._replace(command=[*under, *part.command], env=env)

    def profiled(self, name: str, limit: int) -> Part:
        """The kernels of one call of each operator, under ncu."""
        under = [program("ncu"), "--profile-from-start", "off", "--clock-control", "none", "--set", "full"]
        part = self.script(name, limit, "one_call", "--operators", "batch_norm", "conv2d", "--calls", "1")
        show = r" .*, Context \d|  +(Duration|DRAM Throughput|Registers Per Thread) "
        return part._replace(
            command=[*under, *part.command] if self.on_cuda else part.command, show=show, if_right=True
        )


def program(name: str) -> str:
    """Where a tool of the CUDA toolkit is; its name alone where it is nowhere, which then fails by that name."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{toolkit}/bin") or name


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
