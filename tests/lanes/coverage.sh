#!/usr/bin/env bash
# Which lines of csrc/ the tests run: the core and its bindings built for gcov, their tests on every instruction set
# that this CPU has, and a table of lines and branches per file. Fails below 95 % of lines.
#
# Not counted, and said so: what another machine compiles (vec_neon.h: the qemu lane runs it), levels that this CPU
# lacks, and the CUDA kernels, whose own source the emulator lane runs under two sanitizers.
#
#   PYTHON            has what the tests need (default: python3)
#   CC, CXX, GCOV     gcc, g++ and their gcov (defaults: gcc, g++, gcov)
#   MIXKVQ_EXAMPLES   share of the hypothesis examples that are run (default: 0.2)
#   arguments         for pytest, in place of the files below
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
tests=(tests/test_bind.py tests/test_check.py tests/test_core_*.py tests/test_golden.py tests/test_isa.py tests/test_ops.py
    tests/test_operators*.py tests/test_status.py)

fail() {
    echo "coverage lane: $*" >&2
    exit 1
}

export CC=${CC:-gcc} CXX=${CXX:-g++} GCOV=${GCOV:-gcov}
command -v "$GCOV" >/dev/null || fail "needs gcov, which comes with gcc"
here=$PWD/build/coverage
mkdir -p "$here"
rm -rf "$here/lib"
find "$here" -name '*.gcda' -delete
counted="-O1 --coverage -fprofile-update=prefer-atomic"
CFLAGS="${CFLAGS:-} $counted" CXXFLAGS="${CXXFLAGS:-} $counted" LDFLAGS="${LDFLAGS:-} --coverage" MIXKVQ_CUDA=off \
    "$python" setup.py -q build_py --build-lib "$here/lib" \
    build_ext --build-lib "$here/lib" --build-temp "$here/objects" >"$here/build.log" 2>&1 ||
    { cat "$here/build.log" >&2 && fail "the core does not build"; }

export PYTHONPATH=$here/lib OMP_NUM_THREADS=1 MIXKVQ_EXAMPLES=${MIXKVQ_EXAMPLES:-0.2}
"$python" -P -c 'import sys; from mixkvq import _core; print("levels:", _core.isas())
_core.__file__.startswith(sys.argv[1]) or sys.exit(f"{_core.__file__} is another build")' "$here" ||
    fail "the core does not load"
(($#)) || set -- "${tests[@]}"
# one process: counts are written when it ends, and workers are ended before that
"$python" -P -m pytest -q -p no:cacheprovider "$@" || fail "tests fail"
"$python" tests/lanes/coverage_table.py "$here/objects" 95 || fail "the tests run too little of csrc/"
