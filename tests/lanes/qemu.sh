#!/usr/bin/env bash
# The tests that need no torch on 64-bit ARM: a cross-compiled core under qemu-user, with Debian's CPython and NumPy's
# own wheel for that architecture. Everything lies in build/qemu; what is there is not fetched again.
#
#   PYTHON            has pip, any architecture (default: python3)
#   JOBS              processes that run tests (default: one per CPU)
#   MIXKVQ_EXAMPLES   share of the hypothesis examples that are run (default: 0.1; qemu is about 20 times slower)
#   arguments         for pytest, in place of the files below
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
tests=(tests/test_bind.py tests/test_cli_info.py tests/test_config.py tests/test_core_*.py tests/test_golden.py
    tests/test_isa.py tests/test_reference*.py)

fail() {
    echo "qemu lane: $*" >&2
    exit 1
}

# ---- tools of this machine -------------------------------------------------------------------------------------------
needs=()
command -v qemu-aarch64 >/dev/null || needs+=(qemu-user)
command -v nm >/dev/null || needs+=(binutils)
command -v aarch64-linux-gnu-gcc >/dev/null || needs+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
if ((${#needs[@]})); then
    command -v apt-get >/dev/null || fail "needs the Debian packages ${needs[*]}"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${needs[@]}"; } >&2 ||
        fail "apt-get could not install ${needs[*]}"
fi

# ---- an ARM Debian with Python, in a folder: apt with its own state, nothing of this machine's changes --------------
here=$PWD/build/qemu
root=$here/root
if [ ! -e "$here/root.done" ]; then
    rm -rf "$here"
    mkdir -p "$here"/apt/{lists,archives}/partial "$root"
    touch "$here/apt/status"
    cat >"$here/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "root";
Dir::State "$here/apt";
Dir::State::status "$here/apt/status";
Dir::Cache "$here/apt";
END
    export APT_CONFIG=$here/apt.conf
    apt-get update -qq || fail "apt-get update for arm64 failed"
    apt-get install -y -qq --no-install-recommends --download-only python3 libstdc++6 >"$here/apt.log" ||
        fail "no arm64 Python: see $here/apt.log"
    version=$(basename "$here"/apt/archives/python3.*-minimal_*.deb | cut -d- -f1) # python3.11
    (cd "$here/apt/archives" && apt-get download -qq "lib$version-dev") || fail "no headers of arm64 $version"
    for package in "$here"/apt/archives/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
    unset APT_CONFIG
    echo "$version" >"$here/root.done"
fi
version=$(cat "$here/root.done")

# ---- a virtual environment whose python is a script that starts qemu: sys.executable works in tests ----------------
venv=$here/venv
site=$venv/lib/$version/site-packages
if [ ! -e "$here/venv.done" ]; then
    mkdir -p "$venv/bin" "$site"
    cat >"$venv/bin/python" <<END
#!/bin/sh
QEMU_CPU=\${QEMU_CPU:-max,sve=off,pauth-impdef=on} exec qemu-aarch64 -L "$root" -0 "\$0" "$root/usr/bin/$version" "\$@"
END
    chmod +x "$venv/bin/python"
    echo "home = $root/usr/bin" >"$venv/pyvenv.cfg"
    "$python" -m pip --disable-pip-version-check install -qq --no-warn-conflicts --upgrade --target "$site" \
        --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --python-version "${version#python}" \
        --only-binary :all: 'numpy>=2.0' 'setuptools>=77' typing_extensions 'pytest>=8' pytest-xdist hypothesis ||
        fail "pip found no wheels for aarch64 and $version"
    touch "$here/venv.done"
fi
"$venv/bin/python" -c 'import platform, numpy; assert platform.machine() == "aarch64"' ||
    fail "$venv/bin/python does not run NumPy for aarch64"

# ---- the product, built by its own setup.py, which sees an ARM machine ------------------------------------------------
rm -rf "$site/mixkvq"
MIXKVQ_TORCH=off MIXKVQ_CUDA=off MIXKVQ_WERROR=1 CC=aarch64-linux-gnu-gcc CFLAGS="-I$root/usr/include" \
    "$venv/bin/python" setup.py -q build_py --build-lib "$site" \
    build_ext --build-lib "$site" --build-temp "$here/objects" >"$here/build.log" 2>&1 ||
    { cat "$here/build.log" >&2 && fail "the core does not build"; }
"$venv/bin/python" -P -c 'from mixkvq import _core; print("levels:", _core.isas(), "in use:", _core.isa())
assert all(dict(_core.isas()).values())' || fail "the core lacks a level"
QEMU_CPU=cortex-a72 "$venv/bin/python" -P -c 'from mixkvq import _core
assert _core.isa() == "neon" and not dict(_core.isas())["neon-dot"]' ||
    fail "a CPU without dot product instructions must take neon"

(($#)) || set -- "${tests[@]}" -k "not scalar or golden or isa" # scalar has its full tests without an emulator
MIXKVQ_EXAMPLES=${MIXKVQ_EXAMPLES:-0.1} OMP_NUM_THREADS=1 \
    "$venv/bin/python" -P -m pytest -q -rs -p no:cacheprovider -n "${JOBS:-$(nproc)}" "$@" ||
    fail "tests fail on aarch64"
