#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: builds, tests, sanitizes, measures. Needs Python 3.12 with torch
# and transformers, a C/C++ compiler and nvcc; compute-sanitizer where it is; no package index and no .git folder.
#
#   benchmarks/gpu.sh                 all steps
#   benchmarks/gpu.sh build kernels   these steps, in this order
#   benchmarks/gpu.sh --rehearse      all steps without a GPU: tiny sizes on the CPU, emulated kernels
#
#   build      the package for this GPU, in place; the helper programs
#   test       tests/test_gpu_*.py; tests/test_cuda_*.py on the device in place of the emulator
#   sanitize   memcheck, racecheck, initcheck, synccheck on small arrays
#   rate       copy and read rate; subnormal operands of tensor cores
#   kernels    attention against SDPA; packing, unpacking, appending, query statistics
#   model      a random 8B Llama: tokens/s, memory, the peak of a long prompt, the largest batch
#   cpu        the CPU kernels at this host's best instruction set
#   profile    only when asked for: what ncu counts of one launch of attention
#
# OUT (build/gpu) gets a log per step and gpu.jsonl, to which every run appends. SECONDS_TOTAL (520) is shared by the
# steps by weight; what a step leaves goes to those after it. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SELF=$PWD/benchmarks/gpu.sh

STEPS=(build test sanitize rate kernels model cpu)
declare -A WEIGHT=([build]=20 [test]=8 [sanitize]=6 [rate]=2 [kernels]=9 [model]=9 [cpu]=3 [profile]=3)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu} # relative to the root of the tree
TOTAL=${SECONDS_TOTAL:-520}
TOOLS=build/gpu-tools
REHEARSE=

say() { printf '%s\n' "$*"; }
die() {
    say "gpu.sh: $*" >&2
    exit 2
}

# ---- what each step runs; lines that begin with "==" are its summary ----------------------------------------------
build() {
    local flags=(MIXKVQ_TORCH=require)
    if [[ $REHEARSE ]]; then
        flags+=(MIXKVQ_CUDA=off)
    else
        flags+=(MIXKVQ_CUDA=require MIXKVQ_CUDA_ARCHS="$ARCH")
    fi
    env "${flags[@]}" "$PYTHON" setup.py -q build_ext --inplace
    mkdir -p "$TOOLS"
    if [[ ! $REHEARSE ]]; then
        for name in subnormals planted; do
            nvcc -std=c++20 -O3 -arch="sm_$ARCH" "benchmarks/gpu/$name.cu" -o "$TOOLS/$name"
        done
    fi
    say "== built $("$PYTHON" -c 'import mixkvq; print("mixkvq", mixkvq.__version__)') for ${ARCH:-the CPU}"
}

# pytest exits with 5 where it has selected nothing
tests_() {
    local workers=$(($(nproc) / 2)) parallel=()
    ((workers < 3)) || ! "$PYTHON" -c 'import xdist' 2>/dev/null || parallel=(-n "$((workers < 8 ? workers : 8))")
    "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short "${parallel[@]}" "$@" || [[ $? == 5 ]]
}

test_() {
    local failed=0 emulator=device file files=()
    [[ ! $REHEARSE ]] || emulator=copies
    # else all tests are skipped, which is no success
    [[ $REHEARSE ]] || "$PYTHON" -c 'import sys, on_device
from mixkvq.torch_module import CUDA_PROBLEM
sys.exit(CUDA_PROBLEM or on_device.missing())'
    for file in tests/test_gpu_*.py; do
        [[ $file == tests/test_gpu_scripts.py ]] || files+=("$file") # that one needs no GPU
    done
    say "# on tensors"
    MIXKVQ_REHEARSE=${REHEARSE:-} tests_ "${files[@]}" 2>&1 | tee "$TOOLS/tensors" || failed=1
    say "# the tests of the emulator, on the device"
    if "$PYTHON" -c 'import hypothesis' 2>/dev/null; then
        MIXKVQ_EXAMPLES=0.3 MIXKVQ_EMULATOR=$emulator tests_ tests/test_cuda_*.py 2>&1 | tee "$TOOLS/arrays" || failed=1
    else
        say "not run: hypothesis is not installed" | tee "$TOOLS/arrays"
    fi
    say "== tensors: $(outcome "$TOOLS/tensors"); kernels: $(outcome "$TOOLS/arrays")"
    return $failed
}

# the last line of pytest
outcome() { grep -E 'passed|failed|error|skipped|not run|none|no tests' "$1" | tail -n 1 | sed 's/^=* *//; s/ *=*$//' || true; }

sanitize() { program sanitize --planted "$TOOLS/planted"; }

rate() { program rates ${REHEARSE:+--rounds 2} $([[ $REHEARSE ]] || say --subnormals "$TOOLS/subnormals"); }

kernels() {
    local all=$LEFT
    LEFT=$((all * 3 / 4)) program attention
    LEFT=$((all - SECONDS - 2)) program verbs
}

model() { program model; }

cpu() {
    local levels best failed=0
    levels=$("$PYTHON" -c 'from mixkvq import _core; print(*[name for name, there in _core.isas() if there])')
    best=${levels##* }
    MIXKVQ_ISA=$best tests_ tests/test_golden.py tests/test_isa.py || failed=1
    if "$PYTHON" -c 'import hypothesis' 2>/dev/null; then
        MIXKVQ_EXAMPLES=0.3 tests_ tests/test_core_*.py -k "$best" | tee "$TOOLS/core" || failed=1
    else
        say "not run: hypothesis is not installed" | tee "$TOOLS/core"
    fi
    say "== $best (of $levels): $(outcome "$TOOLS/core")"
    return $failed
}

profile() {
    local counters=gpu__time_duration.sum,dram__bytes_read.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    counters+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
    counters+=,launch__registers_per_thread,launch__shared_mem_per_block_dynamic,launch__occupancy_limit_registers
    ncu --clock-control none --target-processes all --kernel-name regex:attend --launch-skip 1 --launch-count 1 \
        --metrics "$counters" "$PYTHON" -m gpu.one
}

# A program of benchmarks/gpu with the time that is left.
program() {
    local name=$1
    shift
    "$PYTHON" -m "gpu.$name" --out "$OUT/gpu.jsonl" --seconds "$LEFT" ${REHEARSE:+--rehearse} "$@"
}

# ---- one step, in a process of its own so that it can be stopped ---------------------------------------------------
if [[ ${1-} == --inside ]]; then
    REHEARSE=$GPU_REHEARSE ARCH=$GPU_ARCH LEFT=$3
    export PYTHONPATH="$PWD:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    case $2 in test) test_ ;; *) "$2" ;; esac
    exit
fi

# ---- all steps -----------------------------------------------------------------------------------------------------
if [[ ${1-} == --rehearse ]]; then
    REHEARSE=1
    shift
fi
wanted=("$@")
((${#wanted[@]})) || wanted=("${STEPS[@]}")
for step in "${wanted[@]}"; do
    [[ -v WEIGHT[$step] ]] || die "unknown step '$step', must be one of ${STEPS[*]} profile"
done
"$PYTHON" -c 'import torch' 2>/dev/null || die "$PYTHON has no torch"
ARCH=
if [[ ! $REHEARSE ]]; then
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ') || true
    [[ $capability =~ ^[0-9]+$ ]] || die "no NVIDIA GPU here (nvidia-smi lists none); --rehearse needs none"
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die "torch cannot use the GPU"
    command -v nvcc >/dev/null || die "nvcc is not on PATH"
    ARCH=$capability
    [[ $ARCH != 90 ]] || ARCH=90a
fi
export GPU_REHEARSE=$REHEARSE GPU_ARCH=$ARCH OUT PYTHON
mkdir -p "$OUT" "$TOOLS"

left_weight=0 broken=0
for step in "${wanted[@]}"; do left_weight=$((left_weight + WEIGHT[$step])); done
for step in "${wanted[@]}"; do
    left=$((TOTAL - SECONDS))
    budget=$((left * WEIGHT[$step] / left_weight))
    left_weight=$((left_weight - WEIGHT[$step]))
    ((budget > 1)) || budget=1
    begin=$SECONDS code=0
    timeout -k 5 $((budget + 2)) "$BASH" "$SELF" --inside "$step" "$budget" >"$OUT/$step.log" 2>&1 || code=$?
    note=$(sed -n 's/^== //p' "$OUT/$step.log" | paste -sd ';' | sed 's/;/; /g')
    case $code in
        0) state=done ;;
        124 | 137) state="stopped after $budget s" ;;
        *) state="failed ($code)" ;;
    esac
    ((code == 0)) || broken=1
    [[ $note ]] || note=$(tail -n 1 "$OUT/$step.log" | cut -c-160)
    printf '%-9s %4d s  %-12s %s\n' "$step" $((SECONDS - begin)) "$state" "$note"
    case $step in
        build | test | cpu)
            PYTHONPATH=benchmarks "$PYTHON" -m gpu.record "$OUT/gpu.jsonl" "$step" "$step" seconds=$((SECONDS - begin)) \
                exit=$code --note "$note"
            ;;
    esac
    if [[ $step == build && $code != 0 ]]; then
        say "stopped: nothing can be measured without a build; see $OUT/build.log"
        break
    fi
done
say
[[ ! -s $OUT/gpu.jsonl ]] || PYTHONPATH=benchmarks "$PYTHON" -m gpu.table "$OUT/gpu.jsonl"
say "rows: $OUT/gpu.jsonl; logs: $OUT/*.log"
exit $broken
