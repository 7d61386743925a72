#!/usr/bin/env bash
# Everything there is to check and measure on a CUDA machine, in ten minutes, with what is installed there: no network.
#
#   bash bench/gpu_suite.sh
#
#   PYTHON=python3           a Python with torch, setuptools, pybind11, ninja and pytest
#   OUT=build/gpu_suite      a log per part, the results in JSON, and summary.txt
#   BUDGET=580               seconds for everything; a part is cut, or left out, when they are spent
#   LIMIT=20                 seconds for each part, in the place of its own
#   PARTS="build doctor"     those parts alone
#
# A part that fails or runs out of its time is reported, and the suite goes on; it exits with 1 if any failed or was left
# out because the time was spent. Without a CUDA device the parts that need one are skipped and counted.
set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu_suite}
BUDGET=${BUDGET:-580}
LIMIT=${LIMIT:-}
PARTS=${PARTS:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

mkdir -p "$OUT" || exit 1
summary=$OUT/summary.txt
: >"$summary"
passed=0 failed=0 skipped=0 left_out=0

report() { # report STATUS PART SECONDS DETAIL
    printf '%-8s %-12s %4d s  %s\n' "$1" "$2" "$3" "$4" | tee -a "$summary"
}

skip() { # skip PART REASON
    skipped=$((skipped + 1))
    report skipped "$1" 0 "$2"
}

wanted() { # wanted PART
    [ -z "$PARTS" ] || [[ " $PARTS " == *" $1 "* ]]
}

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=${LIMIT:-$2} log=$OUT/$1.log left=$((BUDGET - SECONDS)) start=$SECONDS status
    shift 2
    wanted "$name" || return
    if [ "$left" -lt 5 ]; then
        left_out=$((left_out + 1))
        skip "$name" "the budget of $BUDGET s is spent"
        return
    fi
    [ "$limit" -le "$left" ] || limit=$left
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1
    status=$?
    if [ "$status" -eq 0 ]; then
        passed=$((passed + 1))
        report passed "$name" $((SECONDS - start)) "$(tail -n 1 "$log")"
        return
    fi
    failed=$((failed + 1))
    tail -n 25 "$log" | sed 's/^/    /'
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        report FAILED "$name" $((SECONDS - start)) "timed out after $limit s"
    else
        report FAILED "$name" $((SECONDS - start)) "status $status, see $log"
    fi
}

on_device() { # on_device NAME SECONDS COMMAND...
    wanted "$1" || return
    if [ -n "$no_device" ]; then
        skip "$1" "$no_device"
    elif ! command -v "$3" >/dev/null; then
        skip "$1" "there is no $3"
    else
        part "$@"
    fi
}

without_device() { # without_device NAME SECONDS COMMAND...: in the place of a part on the device
    [ -z "$no_device" ] || part "$@"
}

no_device=
timeout 60 "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$OUT/device.log" ||
    no_device="no CUDA device: torch.cuda.is_available() is false"

part build 150 "$PYTHON" setup.py build_ext --inplace
part doctor 60 "$PYTHON" -m kfo_ext doctor
# With a device every test of it would be skipped, and nothing fail, if the library did not load.
on_device loads 30 "$PYTHON" -c 'from kfo_ext.ops import library
loads, reason = library.status()["cuda"]
raise SystemExit(0 if loads else reason)'
on_device gpu_tests 200 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider python_tests/gpu

groups="CNN(2),CNN(4),conv_64,head_5x1600"
on_device bench 240 "$PYTHON" -m kfo_ext bench --quick --device cuda --axes tasks --tasks 16,64 --groups "$groups" \
    --providers native,triton,gradients-on,lists,torch-matmul,torch-formulas,learn2learn,jax \
    --repeats 15 --budget 5 --limit 120 --out "$OUT/bench"
# Apart: compiling takes far longer than timing.
on_device compiled 120 "$PYTHON" -m kfo_ext bench --quick --device cuda --axes tasks --tasks 16 --groups "$groups" \
    --providers native,torch-formulas-compile --repeats 15 --limit 60 --out "$OUT/compiled"
on_device meta 90 "$PYTHON" bench/meta_peers.py --device cuda --networks omniglot_cnn2 omniglot_cnn4 --methods kfo \
    --contenders ours_native ours_native_graph ours_triton ours_reference learn2learn --repeats 7 --no-memory --out "$OUT/meta_peers.json"
# Apart: what JAX compiles may take long, and a table is written when it is whole.
on_device meta_jax 90 "$PYTHON" bench/meta_peers.py --device cuda --networks omniglot_cnn2 --methods kfo \
    --contenders ours_native_graph jax_vmap jax_vmap_patches --repeats 7 --no-memory --out "$OUT/meta_jax.json"
on_device precision 45 "$PYTHON" bench/precision.py --device cuda --repeats 7 --out "$OUT/precision.json"
on_device conv_forms 60 "$PYTHON" bench/conv_forms.py --device cuda --networks omniglot_cnn2 cifar_fs_cnn2 --repeats 5 \
    --out "$OUT/conv_forms.json"
on_device ncu 60 ncu --profile-from-start off --clock-control none --set full \
    "$PYTHON" bench/one_call.py --worst-of "$OUT/bench/results.json"
# Apart: it takes a process for each contender.
on_device memory 60 "$PYTHON" bench/meta_peers.py --device cuda --networks omniglot_cnn2 --methods kfo \
    --contenders ours_native ours_native_graph ours_reference --repeats 1 --out "$OUT/memory.json"

on_device case 60 "$PYTHON" bench/sanitize_case.py
# With every tensor an allocation of its own, the sanitizer sees the edges and the uninitialised elements of each.
for tool in memcheck racecheck initcheck synccheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 on_device "$tool" 90 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" bench/sanitize_case.py
done

# The same code on the CPU, and its own tests: on a device the time is for what needs one.
without_device op_tests 200 "$PYTHON" -m pytest -q -p no:cacheprovider \
    python_tests/test_transform.py python_tests/test_derivatives.py python_tests/test_plan.py python_tests/test_kfo.py
without_device case_on_host 60 "$PYTHON" bench/sanitize_case.py --device cpu
without_device bench_on_host 60 "$PYTHON" -m kfo_ext bench --quick --axes tasks --tasks 2 --repeats 3 --out "$OUT/bench_on_host"
without_device precision_on_host 60 "$PYTHON" bench/precision.py --quick --out "$OUT/precision_on_host.json"

echo "== $passed passed, $failed failed, $skipped skipped in $SECONDS s; logs in $OUT" | tee -a "$summary"
[ $((failed + left_out)) -eq 0 ]
