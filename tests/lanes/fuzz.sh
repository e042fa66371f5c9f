#!/usr/bin/env bash
# Fuzzing of the C core with libFuzzer under AddressSanitizer and UBSan, and of the loaders of files with a loop of
# their own: tests/fuzz. New inputs go to build/fuzz/corpus, those that find something to build/fuzz; the small corpora
# that tests/test_fuzz.py replays lie in tests/data/fuzz.
#
#   PYTHON      has what the tests need (default: python3)
#   FUZZ_SECONDS    per target (default: 60)
#   SHRINK=1    also makes tests/data/fuzz from the corpora found: as few inputs as cover the same edges
#   arguments   targets, in place of all
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
seconds=${FUZZ_SECONDS:-60}
here=$PWD/build/fuzz
compiled=(records arguments roundtrip isa)
(($#)) || set -- "${compiled[@]}" files

fail() {
    echo "fuzz lane: $*" >&2
    exit 1
}

# ---- tools of this machine -------------------------------------------------------------------------------------------
clang=${CLANG:-clang}
mkdir -p "$here/corpus"
echo 'int LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return p && n > 99; }' >"$here/probe.c"
works() { "$clang" -fsanitize=fuzzer,address,undefined "$here/probe.c" -o "$here/probe" 2>/dev/null; }
if ! works; then
    command -v apt-get >/dev/null || fail "needs clang with libFuzzer (Debian: clang libclang-rt-14-dev)"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends clang &&
        version=$("$clang" -dumpversion) &&
        apt-get install -y -qq --no-install-recommends "libclang-rt-${version%%.*}-dev"; } >&2 ||
        fail "apt-get could not install clang and its libFuzzer"
    works || fail "$clang has no libFuzzer"
fi

# ---- the core, built by its own setup.py, and the targets ------------------------------------------------------------
# UBSan traps: with messages the kernels take many times as long to compile. The signal's stack names the line.
checks=address,undefined,float-cast-overflow
flags="-O1 -gline-tables-only -fno-unroll-loops -fno-vectorize -fno-slp-vectorize -fsanitize=fuzzer-no-link,$checks \
-fsanitize-trap=undefined,float-cast-overflow"
MIXKVQ_TORCH=off MIXKVQ_CUDA=off CC=$clang CFLAGS=$flags \
    "$python" setup.py -q build_ext --build-lib "$here/lib" --build-temp "$here/objects" >"$here/build.log" 2>&1 ||
    { tail -50 "$here/build.log" >&2 && fail "the core does not build"; }
objects=()
for source in csrc/*.c csrc/cpu/*.c; do
    object=$here/objects/mixkvq._core/$(basename "$source" .c).o
    [ ! -e "$object" ] || objects+=("$object") # kernels of other architectures have none
done

build() { # a target
    "$clang" -std=c11 $flags -fsanitize=fuzzer -Wall -Wextra -Wshadow -Werror -Icsrc "tests/fuzz/$1.c" "${objects[@]}" \
        -lm -o "$here/$1" || fail "$1 does not build"
}

# ---- running ---------------------------------------------------------------------------------------------------------
found=0
summary=()
for target; do
    if [ "$target" = files ]; then
        "$python" -P tests/fuzz/files.py --seconds "$seconds" --found "$here" | tee "$here/files.log" || found=1
        summary+=("$(tail -1 "$here/files.log")")
        continue
    fi
    build "$target"
    corpus=$here/corpus/$target
    mkdir -p "$corpus" "tests/data/fuzz/$target"
    status=0
    "$here/$target" -max_total_time="$seconds" -max_len=512 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 \
        -artifact_prefix="$here/$target-" "$corpus" "tests/data/fuzz/$target" >"$here/$target.log" 2>&1 || status=$?
    if ((status)); then
        found=1
        grep -E "does not hold|ERROR|SUMMARY|#[0-9]+ 0x.* in |Test unit written" "$here/$target.log" | head -20 || true
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$here/$target.log" | tail -1)
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$here/$target.log" | tail -1)
    line="$target: ${runs:-?} executions, ${edges:-?} edges, $(ls "$corpus" | wc -l) inputs"
    ((status)) && line+=", A FINDING: see build/fuzz/$target.log" || line+=", 0 findings"
    summary+=("$line")
    echo "$line"
    if [ -n "${SHRINK:-}" ] && ((!status)); then
        small=$here/small/$target
        rm -rf "$small" && mkdir -p "$small"
        "$here/$target" -merge=1 -use_counters=0 -max_len=512 "$small" "tests/data/fuzz/$target" "$corpus" 2>/dev/null
        rm -rf "tests/data/fuzz/$target" && cp -r "$small" "tests/data/fuzz/$target"
        echo "$target: tests/data/fuzz has $(ls "$small" | wc -l) inputs, $(cat "$small"/* | wc -c) bytes"
    fi
done
printf 'fuzz lane: %s\n' "${summary[@]}"
((!found)) || fail "findings, with reproducers in build/fuzz"
echo "fuzz lane: no findings"
