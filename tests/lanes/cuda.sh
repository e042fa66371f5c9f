#!/usr/bin/env bash
# The CUDA kernels compile for every part that the build names, without a warning, and take of each no more registers
# than planned: no spills, all within their budgets (cuda_resources.py). No kernel is run; the module is loaded, which
# must need no driver.
#
#   PYTHON              has NumPy and setuptools (default: python3)
#   NVCC                the compiler (default: nvcc on PATH; where there is none, pip brings one to build/cuda)
#   MIXKVQ_CUDA_ARCHS   parts to compile for (default: those of setup.py)
#   MIXKVQ_CUDA=off     does nothing
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
here=$PWD/build/cuda

fail() {
    echo "cuda lane: $*" >&2
    exit 1
}

if [ "${MIXKVQ_CUDA:-}" = off ]; then
    echo "cuda lane: nothing done (MIXKVQ_CUDA=off)"
    exit 0
fi
mkdir -p "$here"
export NVCC=${NVCC:-$(command -v nvcc || echo "$here/toolkit/nvidia/cu13/bin/nvcc")}
if [ ! -e "$NVCC" ]; then
    "$python" -m pip install -q --no-deps --target "$here/toolkit" nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 >"$here/log" 2>&1 ||
        fail "nvcc is not found and pip cannot bring it (see $here/log): name it in NVCC, or set MIXKVQ_CUDA=off"
fi
SECONDS=0
MIXKVQ_CUDA=require MIXKVQ_TORCH=off MIXKVQ_WERROR=1 \
    "$python" setup.py -q build_ext --build-lib "$here/lib" >"$here/log" 2>&1 ||
    { cat "$here/log" >&2 && fail "mixkvq._cuda does not build"; }
grep -o 'mixkvq: building mixkvq._cuda .*' "$here/log"
"$python" tests/lanes/cuda_resources.py build/objects/mixkvq._cuda/*.log || fail "a kernel takes too much"
CUDA_VISIBLE_DEVICES='' "$python" -I - "$here/lib/mixkvq/_cuda.abi3.so" <<'END' || fail "mixkvq._cuda cannot be loaded"
import sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("mixkvq._cuda", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
drivers = [line for line in open("/proc/self/maps") if "libcuda.so" in line]
assert not drivers, "it loads the driver when it is imported"
print("cuda lane: loaded without a driver:", module.built)
END
echo "cuda lane: $(stat -c %s "$here/lib/mixkvq/_cuda.abi3.so") bytes in _cuda.abi3.so, built in $SECONDS s"
