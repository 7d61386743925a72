#!/usr/bin/env bash
# Everything there is to check and measure on a CUDA machine, in at most 480 s, with what is installed there: no network.
#
#   bash bench/gpu_suite.sh
#
#   PYTHON=python3             a Python with torch and pytest; to build there also setuptools, pybind11 and ninja
#   OUT=build/gpu_suite_out    where summary.txt and gpu_suite.tar.gz go: all logs and results
#   PARTS="smoke memcheck"     those parts alone, of gpu_parts.py
#   BUDGET=480                 seconds for everything
#   DEVICE=cuda                cpu: a rehearsal, with less work and without the tools of CUDA
#   KFO_TEST_TIMEOUT_SCALE=1   by which budget and limits grow: for a rehearsal on a slow or busy machine
#
# Before it, where the code is: `bash bench/gpu_carry.sh`.
set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH="$PWD:$PWD/build/gpu_carry/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" bench/gpu_suite.py
