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
    for module, fact in (("_torch", "torch_headers"), ("_cuda", "cuda_kernels")):
        present = (Path(_core.__file__).parent / f"{module}.abi3.so").exists()
        assert (module in info["modules"].split()) == present == (info[fact] is not None)


@pytest.fixture(params=["_core", "_torch", "_cuda"])
def library(request: pytest.FixtureRequest) -> Path:
    path = Path(_core.__file__).parent / f"{request.param}.abi3.so"
    if not path.exists():
        pytest.skip(f"{path.name} was not built")
    return path


def test_a_library_exports_its_entry_point_only(library):
    """Hidden symbols cannot clash with another library's."""
    table = run("nm", "-D", "--defined-only", library, cwd=ROOT).stdout
    assert [line.split()[-1] for line in table.splitlines()] == [f"PyInit_{library.name.partition('.')[0]}"]


def test_a_library_needs_stable_interfaces_only(library):
    """A symbol comes with a version, or is of Python or of torch's C interface: nothing of C++'s at:: and c10::."""
    table = run("nm", "-D", "--undefined-only", library, cwd=ROOT).stdout
    names = {line.split()[-1] for line in table.splitlines()}
    loose = {name for name in names if "@" not in name} - {"__gmon_start__"}
    torch = {name for name in loose if name.startswith(("aoti_torch_", "torch_"))}
    assert {name for name in loose - torch if not name.startswith(("Py", "_Py", "_ITM_"))} == set()
    assert bool(torch) == library.name.startswith("_torch")


def test_a_library_names_no_folder_of_this_machine(library):
    assert "PATH" not in run("readelf", "-d", library, cwd=ROOT).stdout
    assert b"/torch/include" not in library.read_bytes()


# ---- decisions of setup.py -----------------------------------------------------------------------------------------
def refused(tree: Path, **environment: str) -> str:
    result = run(sys.executable, "setup.py", "--quiet", "build_ext", cwd=tree, check=False, **environment)
    assert result.returncode != 0, result.stdout
    return result.stdout + result.stderr


def test_a_mode_is_one_of_three(tree):
    assert "MIXKVQ_TORCH is 'yes', must be auto, require or off" in refused(tree, MIXKVQ_TORCH="yes")
    assert "MIXKVQ_CUDA is '1', must be auto, require or off" in refused(tree, MIXKVQ_CUDA="1")


def test_cuda_cannot_be_required_without_nvcc(tree, tmp_path):
    without = {"PATH": str(tmp_path), "NVCC": "", "CUDA_HOME": "", "MIXKVQ_TORCH": "off"}
    command = (sys.executable, "setup.py", "--quiet", "build_ext")
    result = run(*command, cwd=tree, check=False, MIXKVQ_CUDA="require", **without)
    message = "MIXKVQ_CUDA=require, but nvcc is not found: put it on PATH or name it in NVCC\n"
    assert (result.returncode, result.stderr) == (1, message)
    assert "mixkvq: not building mixkvq._cuda (nvcc is not found)" in refused(tree, MIXKVQ_CUDA="auto", **without)


def toolkit(folder: Path, release: str, parts: str) -> dict[str, str]:
    """An nvcc and a cc that answer setup.py's questions and compile nothing: the build ends when all is decided."""
    for file in ("include/cuda_runtime_api.h", "lib64/libcudart_static.a"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    (folder / "bin").mkdir()
    answers = {
        "--dryrun": f"#$ TOP={folder}/bin/..",
        "--version": f"Cuda compilation tools, release {release}, V{release}.99",
        "--list-gpu-code": "\n".join(f"sm_{part}" for part in parts.split()),
        "-dumpmachine": "x86_64-linux-gnu",
    }
    cases = "".join(f"{option}) echo '{answer}';;\n" for option, answer in answers.items())
    compiler = folder / "bin/compiler"
    compiler.write_text(f"#!/bin/sh\ncase $1 in\n{cases}*) exit 3;;\nesac\n")
    compiler.chmod(0o755)
    chosen = {"MIXKVQ_TORCH": "off", "MIXKVQ_CUDA": "require", "MIXKVQ_CUDA_ARCHS": ""}
    return {"NVCC": str(compiler), "CC": str(compiler), **chosen}


def test_an_older_nvcc_makes_what_it_can(tree, tmp_path):
    environment = toolkit(tmp_path, "12.4", "50 75 80 86 87 89 90")
    output = refused(tree, **environment)
    assert "this nvcc has no 100+ptx: newer parts get PTX of 90a" in output
    assert f"building mixkvq._cuda (CUDA 12.4: sm_80 sm_86 sm_89 sm_90a compute_90; toolkit in {tmp_path})" in output
    chosen = refused(tree, **environment | {"MIXKVQ_CUDA_ARCHS": "75 90+ptx"})
    assert "building mixkvq._cuda (CUDA 12.4: sm_75 sm_90 compute_90; " in chosen
    for wrong in ("100", "sm_90", "hopper"):
        message = f"MIXKVQ_CUDA_ARCHS names {wrong}, must be of 50 75 80 86 87 89 90 in this nvcc"
        assert message in refused(tree, **environment | {"MIXKVQ_CUDA_ARCHS": f"80 {wrong}"})


def test_an_nvcc_without_cpp20_is_an_error(tree, tmp_path):
    output = refused(tree, **toolkit(tmp_path, "11.8", "80 86"))
    assert "is of CUDA 11.8, which knows no C++20 (>= 12.0): update it or set MIXKVQ_CUDA=off" in output


def test_a_toolkit_without_its_runtime_is_an_error(tree, tmp_path):
    environment = toolkit(tmp_path, "13.0", "80 86")
    (tmp_path / "lib64/libcudart_static.a").unlink()
    assert f"the CUDA toolkit in {tmp_path} has no libcudart_static.a: repair it" in refused(tree, **environment)


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
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", folder, sdist, cwd=folder, MIXKVQ_CUDA="off")
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
    assert not any(
        "_torch.abi3" in name or "_cuda.abi3" in name or name.startswith(("tests", "csrc", "build")) for name in names
    )
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
    result = run(sys.executable, *pip, tree, cwd=tmp_path, MIXKVQ_TORCH="require", MIXKVQ_CUDA="off")
    assert "building mixkvq._torch (torch " in result.stdout + result.stderr
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
