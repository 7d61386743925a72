#!/usr/bin/env bash
# Prepares what travels to a CUDA machine without a network, beside the files of the repository: build/gpu_carry, which git
# ignores. There `bash bench/gpu_suite.sh` finds in it
#
#   kfo_ext/   the compiled libraries, and _plan for that machine's Python, all of the build of these sources
#   site/      learn2learn (its Python files alone) and expecttest
#   commit     what the results are of
#
#   bash bench/gpu_carry.sh
#
#   PYTHON=.venv/bin/python    has torch, learn2learn and expecttest, and builds the libraries unless they are up to date
#   THERE=3.12                 that machine's Python; without one here _plan is left out, and everything is built there
#   CARRY=build/gpu_carry      where gpu_suite.sh looks
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
THERE=${THERE:-3.12}
most=64 # MiB
carry=$(realpath -m "${CARRY:-build/gpu_carry}")
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH"
export PYTHONPATH="$PWD" PATH

build=$("$PYTHON" -c 'from bench.gpu_libraries import source_id; print(source_id())')
for library in kfo_ext/_kfo_cpu.so kfo_ext/_kfo_cuda.so; do
    grep -qa "$build" "$library" 2>/dev/null || KFO_CUDA=1 "$PYTHON" setup.py --quiet build_ext --inplace
done
rm -rf "$carry"
mkdir -p "$carry/kfo_ext" "$carry/site"
cp kfo_ext/_kfo_cpu.so kfo_ext/_kfo_cuda.so "$carry/kfo_ext/"
git describe --always --dirty --abbrev=40 --exclude='*' >"$carry/commit"

there() { # a Python of that version, on PATH or of pyenv
    local python
    for python in "python$THERE" "$(pyenv root 2>/dev/null)/versions/$THERE".*/bin/python; do
        if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$THERE')" 2>/dev/null; then
            echo "$python"
            return
        fi
    done
}
site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python_there=$(there)
if [ -z "$python_there" ]; then
    echo "no Python $THERE here: _plan is left out, and everything will be built there"
else
    # Of the other Python's packages it takes what is the same for any: setuptools, pybind11, torch's headers.
    PYTHONPATH="$PWD:$site" KFO_TORCH_ROOT="$site/torch" "$python_there" - "$carry/kfo_ext" "$build" <<'PLAN'
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import setup
from bench.gpu_libraries import source_version

package, build = Path(sys.argv[1]), sys.argv[2]
work = package.parent.parent / f"plan-{sysconfig.get_config_var('SOABI')}"
torch, torch_version = setup.toolchain.find_torch()
setup.make_links(work, package, torch)
graph = setup.build_graph(source_version(), torch_version, setup.toolchain.find_nvcc(setup.CSRC))
(work / "build.ninja").write_text(graph)
name = f"_plan{sysconfig.get_config_var('EXT_SUFFIX')}"
subprocess.run([setup.toolchain.find_ninja(), "-C", work, "--quiet", f"package/{name}"], check=True)
spec = importlib.util.spec_from_file_location("kfo_ext._plan", package / name)
plan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)
if plan.build_id() != build:
    sys.exit(f"{name}: expected build {build}, got {plan.build_id()}")
for library in package.glob("_kfo_*.so"):
    if build.encode() not in library.read_bytes():
        sys.exit(f"{library.name} is not of build {build}: delete it and run this again")
print(f"{name} imports under Python {sys.version.split()[0]}, as both libraries of build {build}")
PLAN
fi

for package in learn2learn expecttest; do
    if [ -d "$site/$package" ]; then
        # Not what is compiled for this Python; with its version, which results name.
        (cd "$site" && find "$package" "$package"-*.dist-info \( -name '*.py' -o -name METADATA \) -print0 |
            xargs -0 cp --parents -t "$carry/site")
    else
        echo "$package is not installed here: what needs it will be a row that says so"
    fi
done

bytes=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -n 1 | cut -f 1)
carried=$(du -sb "$carry" | cut -f 1)
total=$(((bytes + carried) >> 20))
echo "the tree, $((bytes >> 20)) MiB, and $carry, $((carried >> 20)) MiB: $total MiB of $most"
[ "$total" -lt "$most" ]
