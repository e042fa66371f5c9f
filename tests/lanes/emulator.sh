#!/usr/bin/env bash
# The tests of the CUDA kernels on the emulator (tests/emulator.py), beyond what `make test` runs of them: with other
# orders of the threads; under ThreadSanitizer, where what barriers do not order is a race; under AddressSanitizer and
# UBSan; attention with codes as normal numbers, for GPUs that are slow with subnormal ones.
#
#   PYTHON      has what the tests need (default: python3)
#   JOBS        processes that run tests (default: one per CPU)
#   arguments   for pytest, in place of the files that use the emulator
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export OMP_NUM_THREADS=1
(($#)) || mapfile -t files < <(grep -l '^import emulator' tests/test_*.py)
(($#)) || set -- "${files[@]}"

run() { # what it is, the variant, the share of the examples, then arguments for pytest
    echo "emulator lane: $1"
    MIXKVQ_EXAMPLES=$3 "$python" tests/emulator_build.py "$2" "$python" -P -m pytest -q -p no:cacheprovider --capture=sys \
        -n "${JOBS:-$(nproc)}" "${@:4}" || { echo "emulator lane: tests fail, $1" >&2 && exit 1; }
}

"$python" tests/emulator_build.py plain true || { echo "emulator lane: the kernels do not build" >&2 && exit 1; }
for seed in 2 3; do
    MKVQ_EMULATE_SEED=$seed run "order of threads $seed" plain 0.2 "$@" --deselect tests/test_emulator.py
done
run "ThreadSanitizer" thread 0.1 "$@" --deselect tests/test_emulator.py
run "AddressSanitizer and UBSan" address 0.2 "$@" --deselect tests/test_emulator.py
CXX="${CXX:-g++} -DMKVQ_NORMAL_OPERANDS" run "codes as normal numbers" plain 0.2 tests/test_cuda_attend.py
