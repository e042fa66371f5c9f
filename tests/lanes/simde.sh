#!/usr/bin/env bash
# The tests of the core for the AVX-512 kernels on a CPU that need not have AVX-512: their source over SIMDe, which does
# every instruction's work with AVX2. Checks what the kernels compute, not how the compiler encodes them.
#
#   PYTHON      has what the tests need (default: python3)
#   JOBS        processes that run tests (default: one per CPU)
#   arguments   for pytest, in place of the files below
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
tests=(tests/test_bind.py tests/test_core_*.py tests/test_golden.py tests/test_isa.py)

fail() {
    echo "simde lane: $*" >&2
    exit 1
}

[ "$(uname -m)" = x86_64 ] || fail "needs an x86-64 machine"
if ! echo '#include <simde/x86/avx512/dpwssd.h>' | ${CC:-cc} -E -x c - >/dev/null 2>&1; then
    command -v apt-get >/dev/null || fail "needs SIMDe's headers (Debian: libsimde-dev)"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends libsimde-dev; } >&2 ||
        fail "apt-get could not install libsimde-dev"
fi

here=$PWD/build/simde
mkdir -p "$here"
rm -rf "$here/lib"
MIXKVQ_SIMDE=1 MIXKVQ_TORCH=off MIXKVQ_CUDA=off MIXKVQ_WERROR=1 \
    "$python" setup.py -q build_py --build-lib "$here/lib" \
    build_ext --build-lib "$here/lib" --build-temp "$here/objects" >"$here/build.log" 2>&1 ||
    { cat "$here/build.log" >&2 && fail "the core does not build"; }

export PYTHONPATH=$here/lib MIXKVQ_ISA=avx512-simde OMP_NUM_THREADS=1
"$python" -P -c 'from mixkvq import _core; print("levels:", _core.isas(), "in use:", _core.isa())' ||
    fail "the core does not load (MIXKVQ_ISA=$MIXKVQ_ISA)"
(($#)) || set -- "${tests[@]}" -k "not scalar and not avx2" # these two have their tests elsewhere
"$python" -P -m pytest -q -rs -p no:cacheprovider -n "${JOBS:-$(nproc)}" "$@" || fail "tests fail with AVX-512 over SIMDe"
