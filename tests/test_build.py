"""The build: what setup.py decides, what a wheel holds, and that the installed package is the one under test."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import mixkvq
from mixkvq import _core

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests lie apart from the sources")


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the sources."""
    target = tmp_path_factory.mktemp("sources") / "mixkvq"
    rubbish = shutil.ignore_patterns(".*", "build", "dist", "demo-out", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, target, ignore=rubbish)
    return target


# ---- the package under test ----------------------------------------------------------------------------------------
def test_the_tests_run_against_an_installed_package():
    origin = json.loads(importlib.metadata.distribution("mixkvq").read_text("direct_url.json") or "{}")
    folder = Path(mixkvq.__file__).resolve().parent
    editable = origin.get("dir_info", {}).get("editable", False)
    assert editable or "site-packages" in folder.parts, folder
    assert str(ROOT) not in sys.path


def test_versions_agree():
    assert mixkvq.__version__ == _core.__version__ == importlib.metadata.version("mixkvq")
    assert _core.build_info()["version"] == mixkvq.__version__


def test_build_info_comes_from_the_compiler():
    info = _core.build_info()
    assert info["compiler"].split()[0] in ("gcc", "clang")
    assert info["compiler"].split()[1][0].isdigit()
    assert info["std"] == 201112
    assert info["cuda_kernels"] is None
    present = (Path(_core.__file__).parent / "_torch.abi3.so").exists()
    assert ("_torch" in info["modules"].split()) == present == (info["torch_headers"] is not None)


def test_the_extension_exports_its_entry_point_only():
    """Hidden symbols cannot clash with another library's."""
    table = run("nm", "-D", "--defined-only", _core.__file__, cwd=ROOT).stdout
    assert [line.split()[-1] for line in table.splitlines()] == ["PyInit__core"]


# ---- decisions of setup.py -----------------------------------------------------------------------------------------
def refused(tree: Path, **environment: str) -> str:
    result = run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=tree, check=False, **environment)
    assert result.returncode != 0, result.stdout
    return result.stdout + result.stderr


def test_a_mode_is_one_of_three(tree):
    assert "MIXKVQ_TORCH is 'yes', must be auto, require or off" in refused(tree, MIXKVQ_TORCH="yes")
    assert "MIXKVQ_CUDA is '1', must be auto, require or off" in refused(tree, MIXKVQ_CUDA="1")


def test_cuda_cannot_be_required_yet(tree):
    message = "MIXKVQ_CUDA=require, but this version of mixkvq has no CUDA kernels"
    assert message in refused(tree, MIXKVQ_CUDA="require")


def test_an_nvcc_that_fails_is_an_error(tree, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    nvcc.chmod(0o755)
    output = refused(tree, PATH=f"{tmp_path}:{os.environ['PATH']}", MIXKVQ_TORCH="off")
    assert f"{nvcc} --dryrun failed: repair it or set MIXKVQ_CUDA=off" in output
    assert "broken" in output


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.9.1+cpu", "too old"), ("2.10.0", "has no C++ headers"), ("3.0.0", "has no C++ headers")],
)
def test_a_torch_that_cannot_be_used_is_an_error(tree, tmp_path, version, message):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('setup.py must not import torch')\n")
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    output = refused(tree, PYTHONPATH=str(tmp_path), MIXKVQ_CUDA="off")
    assert f"torch {version}" in output
    assert message in output
    assert "MIXKVQ_TORCH=off" in output


def test_a_compiler_that_fails_is_an_error(tree):
    output = refused(tree, CC="false", MIXKVQ_CUDA="off", MIXKVQ_TORCH="off")
    assert "returned non-zero exit status 1" in output


# ---- from sdist to a bare environment ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def bare(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Path]]:
    """Python of an environment with NumPy and our wheel only, the wheel, and the sdist it was built from."""
    folder = tmp_path_factory.mktemp("bare")
    hook = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", hook, folder, cwd=tree)
    (sdist,) = folder.glob("mixkvq-*.tar.gz")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, sdist, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(python, "-m", "pip", "install", wheel, cwd=folder)
    yield python, wheel, sdist


@pytest.mark.slow
def test_a_bare_install_works_with_numpy_only(bare, tmp_path):
    python, wheel, _ = bare
    assert wheel.name.startswith(f"mixkvq-{mixkvq.__version__}-cp311-abi3-linux")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mixkvq/_core.abi3.so", "mixkvq/_core.pyi", "mixkvq/py.typed", "mixkvq/include/mixkvq.h"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("_torch.abi3" in name or name.startswith(("tests", "csrc", "build")) for name in names)
    for command in (["-m", "mixkvq", "info"], ["-P", python.parent / "mixkvq", "info"]):
        info = run(python, *command, cwd=tmp_path).stdout
        assert mixkvq.__version__ in info
        assert "scalar" in info
    assert "_torch" not in _modules(python, tmp_path)
    refused = run(python, "-c", "import mixkvq; mixkvq.MixKVQCache", cwd=tmp_path, check=False)
    assert "mixkvq.MixKVQCache needs torch: pip install 'mixkvq[hf]'" in refused.stderr


def _modules(python: Path, cwd: Path) -> str:
    return run(python, "-c", "from mixkvq import _core; print(_core.build_info()['modules'])", cwd=cwd).stdout


@pytest.mark.slow
def test_the_header_serves_c_and_cpp(bare, tmp_path):
    (header,) = (bare[0].parents[1] / "lib").rglob("mixkvq/include/mixkvq.h")
    for compiler, language in (("cc", "c"), ("c++", "c++")):
        run(compiler, "-x", language, "-Wall", "-Wextra", "-Werror", "-fsyntax-only", header, cwd=tmp_path)


@pytest.mark.slow
def test_torch_can_be_required(bare, tree, tmp_path):
    """Without torch that fails. With torch, pip's isolated build finds it all the same and builds both modules."""
    pip = ("-m", "pip", "-v", "wheel", "--no-deps", "-w", tmp_path)
    result = run(bare[0], *pip, bare[2], cwd=tmp_path, check=False, MIXKVQ_TORCH="require")
    assert result.returncode != 0
    assert "MIXKVQ_TORCH=require, but torch is not installed in this environment" in result.stdout + result.stderr
    pytest.importorskip("torch")
    result = run(sys.executable, *pip, tree, cwd=tmp_path, MIXKVQ_TORCH="require")
    assert "building mixkvq._core and mixkvq._torch (torch " in result.stdout + result.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "mixkvq/_torch.abi3.so" in names


@pytest.mark.slow
def test_only_what_changed_is_compiled_again(tree, tmp_path):
    def build() -> list[str]:
        arguments = ("setup.py", "--quiet", "build_ext", "--build-lib", tmp_path)
        output = run(sys.executable, *arguments, cwd=tree, MIXKVQ_TORCH="off", MIXKVQ_CUDA="off").stdout
        return sorted(Path(line.split()[-1]).stem for line in output.splitlines() if " -o " in line)

    shutil.rmtree(tree / "build", ignore_errors=True)
    everything = build()
    assert {"calls", "check", "dispatch", "kernels_scalar", "_core.abi3"} <= set(everything)
    assert build() == []
    (tree / "csrc/bind/array.h").touch()
    assert build() == ["_core.abi3", "array", "calls", "core_module", "layer_handle"]
    (tree / "csrc/check.c").touch()
    assert build() == ["_core.abi3", "check"]

    # instruction-set files export their kernel table and nothing else
    for path in (tree / "build/objects/mixkvq._core").glob("kernels_*.o"):
        names = [line.split()[-1] for line in run("nm", "--defined-only", "-g", path, cwd=tree).stdout.splitlines()]
        assert names == [f"mkvq_{path.stem}"]
