#!/usr/bin/env bash
# The tests of cache, layers, hook and command line on older transformers, which lie beside the newest one: an
# environment of its own per version in build/versions, that takes everything else from the environment of PYTHON.
#
#   PYTHON      has the package and what the tests need (default: python3)
#   VERSIONS    of transformers (default: 5.8.1, of the oldest minor that is supported in full)
#   JOBS        processes that run tests (default: one per CPU)
#   arguments   for pytest, in place of the files below
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
tests=(tests/test_agreement.py tests/test_cache_*.py tests/test_cli_generate.py tests/test_cli_score.py
    tests/test_handle.py tests/test_hook.py tests/test_lookup.py tests/test_matrix.py tests/test_proof.py
    tests/test_reasons.py tests/test_saving*.py)

fail() {
    echo "versions lane: $*" >&2
    exit 1
}

(($#)) || set -- "${tests[@]}"
for version in ${VERSIONS:-5.8.1}; do
    env=$PWD/build/versions/$version
    if [ ! -e "$env/done" ]; then
        rm -rf "$env"
        "$python" -m venv --without-pip "$env"
        site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$python" -c 'import site; print(*(f"import site; site.addsitedir({p!r})" for p in site.getsitepackages()), sep="\n")' \
            >"$site/parent.pth"
        # pip sees what the parent has and installs only what this version of transformers wants otherwise
        "$python" -m pip --disable-pip-version-check --python "$env/bin/python" install -q "transformers==$version" \
            >"$env/pip.log" 2>&1 || { cat "$env/pip.log" >&2 && fail "transformers $version cannot be installed"; }
        touch "$env/done"
    fi
    "$env/bin/python" -P -c 'import sys, transformers, mixkvq
print("transformers", transformers.__version__, "mixkvq", mixkvq.__file__)
assert transformers.__version__ == sys.argv[1]' "$version" || fail "$env does not have transformers $version"
    OMP_NUM_THREADS=1 "$env/bin/python" -P -m pytest -q -rs -p no:cacheprovider -n "${JOBS:-$(nproc)}" "$@" ||
        fail "tests fail with transformers $version"
done
