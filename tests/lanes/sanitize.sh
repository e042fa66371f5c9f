#!/usr/bin/env bash
# The tests with tools that see what a result does not show, and for each tool a bug planted into a copy of the sources,
# which it must find:
#   address   AddressSanitizer and UBSan, all that is compiled, torch loaded, at MIXKVQ_ISA=scalar and avx2: the core's
#             tests, then all others
#   thread    ThreadSanitizer, several callers and a pool of threads (for the CUDA kernels: emulator.sh); without torch:
#             its pool is that of libgomp, which is not instrumented, so that every barrier in it would look like a race
#   memory    valgrind, the library as it is shipped at MIXKVQ_ISA=avx2: decisions by memory that was never written
# `address` and `memory` also replay the corpora of fuzz.sh, on every level. A finding is a report of a tool, also of a
# process whose end no test looks at.
#
#   PYTHON            has what the tests need (default: python3)
#   JOBS              processes that run tests (default: one per CPU)
#   SANITIZE          suite (default, 40 minutes); core: the core's tests only, at scalar a part of them (minutes)
#   MIXKVQ_EXAMPLES   share of the hypothesis examples that `address` runs (default: 0.05)
#   arguments         for pytest, in place of the tests that `address` runs
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
what=${SANITIZE:-suite}
root=$PWD
[[ $python != [!/]*/* ]] || python=$root/$python # builds go on in another folder
core=(tests/test_bind.py tests/test_core_*.py tests/test_golden.py tests/test_isa.py)
# valgrind takes 50 times as long: what calls the bindings with every codec; the kernels have the corpora
at_memory=(tests/test_golden.py --deselect tests/test_golden.py::test_oracle_packs_the_golden_bytes)
others=(tests "${core[@]/#/--ignore=}" --ignore=tests/test_build.py # builds wheels, without the sanitizers
    --ignore=tests/test_faults_bindings.py --ignore=tests/test_faults_memory.py # have another malloc than the sanitizer's
    --ignore-glob=tests/test_cuda_*.py --ignore=tests/test_emulator.py)         # emulator.sh has them, with sanitizers
export CC=${CC:-gcc} CXX=${CXX:-g++} OMP_NUM_THREADS=1

fail() {
    echo "sanitize lane: $*" >&2
    exit 1
}

[ "$(uname -m)" = x86_64 ] || fail "needs an x86-64 machine"
[[ $what =~ ^(core|suite)$ ]] || fail "SANITIZE is '$what', must be core or suite"
if ! command -v valgrind >/dev/null; then
    command -v apt-get >/dev/null || fail "needs valgrind"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends valgrind; } >&2 ||
        fail "apt-get could not install valgrind"
fi

# ---- each tool -------------------------------------------------------------------------------------------------------
address_checks=-fsanitize=address,undefined,float-cast-overflow
build() { # variant, folder of the sources: what it makes lies there in build/sanitize
    local flags="-O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all" checks
    local at=build/sanitize/$1 objects=build/sanitize/$1/objects
    case $1 in
    # checks as calls: inline, GCC takes ten times as long for the kernels. A float that no integer holds is extra
    address) checks=$address_checks && flags+=" --param asan-instrumentation-with-call-threshold=0" ;;
    thread) checks=-fsanitize=thread ;;
    memory) flags="" checks="" objects=build/objects ;; # what the package has, if it was built here
    esac
    (
        cd "$2"
        mkdir -p "$at"
        rm -rf "$at/lib"
        [[ $1 == address && $what != core ]] || export MIXKVQ_TORCH=off
        MIXKVQ_CUDA=off CFLAGS="$flags $checks" CXXFLAGS="$flags $checks" LDFLAGS=$checks \
            "$python" setup.py -q build_py --build-lib "$at/lib" \
            build_ext --build-lib "$at/lib" --build-temp "$objects" >"$at/build.log" 2>&1 ||
            { cat "$at/build.log" >&2 && exit 1; }
    ) || fail "does not build for $1"
}

runtime() { # paths of libraries that come with the compiler
    for name; do
        path=$("$CXX" -print-file-name="$name")
        [[ $path == /* ]] || fail "$CXX has no $name"
        echo -n "$path "
    done
}

allocator=malloc # for Python's small objects: the tools do not see what is wrong with those of its own
under() { # variant, folder of the sources, folder for reports, then what follows `python`
    local variant=$1 lib=$2/build/sanitize/$1/lib reports=$3 imported
    mkdir -p "$reports"
    local to="log_path=$reports/report halt_on_error=1 exitcode=66" run=(env PYTHONPATH="$lib" PYTHONMALLOC="$allocator")
    case $variant in
    # libstdc++: AddressSanitizer must know it before torch throws. Leaks: an interpreter that ends leaves thousands
    address) run+=(LD_PRELOAD="$(runtime libasan.so libubsan.so libstdc++.so.6)" UBSAN_OPTIONS="print_stacktrace=1 $to"
        ASAN_OPTIONS="detect_leaks=0 $to" "$python") ;;
    thread) run+=(LD_PRELOAD="$(runtime libtsan.so)" TSAN_OPTIONS="$to" "$python") ;;
    memory) run+=(valgrind -q --trace-children=yes --error-exitcode=66 --suppressions=tests/lanes/valgrind.supp
        --log-file="$reports/report.%p" "$("$python" -c 'import sys; print(sys.executable)')") ;;
    esac
    imported=$("${run[@]}" -P -c 'import mixkvq._core; print(mixkvq._core.__file__)' 2>"$reports/import.log") ||
        { cat "$reports/import.log" >&2 && fail "mixkvq._core cannot be imported for $variant"; }
    [[ $imported == "$lib"/* ]] || fail "mixkvq._core is $imported, not that of $lib"
    "${run[@]}" -P "${@:4}"
}

findings() { # folder of reports, log: those with a finding. UBSan beside AddressSanitizer writes to the log only
    find "$1" -name 'report.*' -size +0
    grep -l 'runtime error: ' "$2" || true
}

# ---- the tests -------------------------------------------------------------------------------------------------------
passed=()
tests() { # variant, instruction set, name, arguments for pytest
    local variant=$1 isa=$2 name=$3 here=$root/build/sanitize/$1 other=avx2 found last status=0
    [ "$isa" = scalar ] || other=scalar
    echo "sanitize lane: $name, $variant at $isa"
    rm -rf "$here/reports-$isa"
    MIXKVQ_ISA=$isa under "$variant" "$root" "$here/reports-$isa" -m pytest -q -p no:cacheprovider --capture=sys \
        -k "not $other and not avx512" -n "${JOBS:-$(nproc)}" --dist worksteal "${@:4}" 2>&1 |
        tee "$here/$isa.log" || status=1
    mapfile -t found < <(findings "$here/reports-$isa" "$here/$isa.log")
    ((${#found[@]} == 0)) || { cat "${found[@]}" >&2 && fail "$variant at $isa reports what is above"; }
    ((status == 0)) || fail "tests fail, $variant at $isa"
    last=$(tail -n 1 "$here/$isa.log" | tr -d =)
    [[ $last =~ (^|[ ,])[1-9][0-9]*\ passed ]] || fail "no tests pass, $variant at $isa: $last"
    passed+=("$name, $variant at $isa: $last")
}

replay() { # name, folder of objects, flags, what runs a program: the corpora of fuzz.sh, without Python
    local objects=() source object target here=$root/build/sanitize/replay inputs=0 files said
    mkdir -p "$here"
    for source in csrc/*.c csrc/cpu/*.c; do
        object=$2/mixkvq._core/$(basename "$source" .c).o
        [ ! -e "$object" ] || objects+=("$object") # kernels of other architectures have none
    done
    for target in arguments isa records roundtrip; do
        "$CC" -std=c11 -O1 -g1 $3 -Icsrc "tests/fuzz/$target.c" tests/fuzz/replay.c "${objects[@]}" -lm \
            -o "$here/$target" || fail "tests/fuzz/$target.c does not build"
        files=(tests/data/fuzz/"$target"/*)
        said=$("${@:4}" "$here/$target" "${files[@]}") || fail "$target finds what is above"
        [ "$said" = "${#files[@]} files" ] || fail "$target says: $said"
        inputs=$((inputs + ${#files[@]}))
    done
    passed+=("$inputs inputs of the corpora replayed under $1")
}

# ---- a bug for each tool, in a copy of the sources -------------------------------------------------------------------
found=0
plant() { # variant, file, what is right there, what is wrong, words of the report
    local reports tree=$root/build/sanitize/$1/planted objects=build/sanitize/$1/objects
    [ "$1" != memory ] || objects=build/objects
    rm -rf "$tree"
    mkdir -p "$tree"
    cp -a setup.py pyproject.toml README.md mixkvq csrc "$tree"
    tar -c --exclude=mixkvq._torch --exclude=mixkvq._cuda "$objects" | tar -xC "$tree" # so that one file is compiled
    "$python" - "$tree/$2" "$3" "$4" <<'END'
import pathlib, sys
file, right, wrong = pathlib.Path(sys.argv[1]), *sys.argv[2:]
assert file.read_text().count(right) == 1, f"{file} does not have exactly once: {right}"
file.write_text(file.read_text().replace(right, wrong))
END
    build "$1" "$tree"
    (MIXKVQ_ISA=avx2 under "$1" "$tree" "$tree/reports" tests/lanes/planted.py) >"$tree/log" 2>&1 || true
    reports=$(cat "$tree/log" "$tree"/reports/report.* 2>/dev/null || true)
    [[ $reports == *"$5"* ]] || fail "$1 does not find the bug planted in $2, see $tree/log"
    found=$((found + 1))
    echo "sanitize lane: $1 finds the bug planted in $2: $4"
}

# ---- all together ----------------------------------------------------------------------------------------------------
for variant in address thread memory; do
    build $variant "$root"
    MIXKVQ_ISA=avx2 under $variant "$root" "$root/build/sanitize/$variant/planted-reports" tests/lanes/planted.py ||
        fail "$variant finds a bug where none is planted"
done
plant address csrc/cpu/dispatch.c 'blocks += args->blocks[b] * heads' 'blocks += args->blocks[b + 1] * heads' \
    'heap-buffer-overflow'
plant address csrc/check.c 'offset = place & ((INT64_C(1) << MKVQ_SLAB_SHIFT) - 1)' \
    'offset = place & ((1 << MKVQ_SLAB_SHIFT) - 1)' 'runtime error: shift exponent 40 is too large'
plant thread csrc/cpu/dispatch.c 'workspace + u * mkvq_partial_floats' 'workspace + mkvq_partial_floats' 'data race'
plant memory csrc/bind/layer_handle.c 'if (n > 0)' 'if (n > 1)' 'depends on uninitialised value'

export MIXKVQ_EXAMPLES=${MIXKVQ_EXAMPLES:-0.05}
replay AddressSanitizer build/sanitize/address/objects $address_checks env UBSAN_OPTIONS=print_stacktrace=1
replay valgrind build/objects "" valgrind -q --error-exitcode=66
if (($#)); then
    tests address scalar "these tests" "$@"
    tests address avx2 "these tests" "$@"
else
    [ "$what" = core ] && few=(tests/test_core_errors.py tests/test_golden.py tests/test_isa.py) || few=("${core[@]}")
    tests address scalar "the core" "${few[@]}"
    tests address avx2 "the core" "${core[@]}"
fi
MIXKVQ_EXAMPLES=0.02 tests thread avx2 "pools and bindings" tests/test_core_threads.py tests/test_bind.py
MIXKVQ_EXAMPLES=0.02 tests memory avx2 "golden records" "${at_memory[@]}"
if (($# == 0)) && [ "$what" != core ]; then
    allocator=pymalloc # or all takes 1.4 times as long, and their objects are those of the core's tests
    tests address scalar "all others" "${others[@]}"
    tests address avx2 "all others" "${others[@]}"
fi

printf 'sanitize lane: %s\n' "${passed[@]}" "0 findings" "$found of 4 planted bugs found"
