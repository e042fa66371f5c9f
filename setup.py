"""Builds mixkvq._core (C11) and, where torch is installed, mixkvq._torch (C++ on the LibTorch stable ABI).

Environment
    MIXKVQ_TORCH, MIXKVQ_CUDA   auto (default): build what the tools found allow; require: fail without; off: don't look
    MIXKVQ_WERROR=1             warnings are errors
    MIXKVQ_SIMDE=1              AVX-512 kernels over SIMDe, which run on any AVX2 machine: for tests, not for speed
    CC, CXX, CFLAGS, CXXFLAGS, LDFLAGS, MAX_JOBS   as usual

A tool that is absent costs one printed line, a tool that is found but fails is an error. torch is never imported:
pip's isolated builds hide it from import, but sysconfig still names the site-packages where its headers lie. Objects
are kept in build/objects (--build-temp) and compiled again only if their command, source or a header they include has
changed.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIMITED_API, ABI_TAG = "0x030b0000", "cp311"
TORCH_TARGET, TORCH_TARGET_MACRO = "2.10", "0x020a000000000000"
WERROR = os.environ.get("MIXKVQ_WERROR") == "1"
SIMDE = os.environ.get("MIXKVQ_SIMDE") == "1"
OBJECTS = "build/objects" + "-werror" * WERROR + "-simde" * SIMDE  # none undoes another
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = (
    [*AVX2, "-Wno-psabi"] if SIMDE else [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
)
ISA_FLAGS = {  # of kernels_<isa>.c, beside kernels_scalar.c
    "x86_64": {"avx2": AVX2, "avx512": AVX512},
    "aarch64": {"neon": [], "neon_dot": ["-march=armv8.2-a+dotprod"]},
}
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Wvla"] + ["-Werror"] * WERROR
HIDDEN = ["-fPIC", "-fvisibility=hidden"]
FLOATS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # never -ffast-math
C_FLAGS = ["-std=c11", "-O3", *HIDDEN, *FLOATS, "-Wstrict-prototypes", *WARNINGS]
CXX_FLAGS = ["-std=c++20", "-O2", *HIDDEN, "-fvisibility-inlines-hidden", *WARNINGS]


def version():
    return re.search(r'__version__ = "(.+)"', Path("mixkvq/version.py").read_text())[1]


# ---- what is there -------------------------------------------------------------------------------------------------
def say(text):
    print(f"mixkvq: {text}", flush=True)


def mode(name):
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "require", "off"):
        sys.exit(f"{name} is {value!r}, must be auto, require or off")
    return value


def find_torch():
    """Folder of the torch package whose headers to use, or None."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
    return next((place for place in places if (place / "version.py").exists()), None)


def torch_build():
    """(folder, version) of the torch to build mixkvq._torch against, or None."""
    wanted = mode("MIXKVQ_TORCH")
    folder = find_torch() if wanted != "off" else None
    if folder is None:
        if wanted == "require":
            sys.exit("MIXKVQ_TORCH=require, but torch is not installed in this environment")
        reason = "MIXKVQ_TORCH=off" if wanted == "off" else "torch is not installed"
        say(f"building mixkvq._core only ({reason}); torch.compile will need mixkvq._torch, all else works without")
        return None
    found = re.search(r"__version__ = '(.+)'", (folder / "version.py").read_text())[1]
    if tuple(int(n) for n in re.findall(r"\d+", found)[:2]) < tuple(int(n) for n in TORCH_TARGET.split(".")):
        sys.exit(f"torch {found} in {folder} is too old (>= {TORCH_TARGET}): update it or set MIXKVQ_TORCH=off")
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        sys.exit(f"torch {found} in {folder} has no C++ headers: reinstall it or set MIXKVQ_TORCH=off")
    say(f"building mixkvq._core and mixkvq._torch (torch {found} in {folder})")
    return folder, found


def check_cuda():
    """The CUDA decision. This version has no CUDA kernels, so all there is to do is to say so."""
    wanted = mode("MIXKVQ_CUDA")
    if wanted == "require":
        sys.exit("MIXKVQ_CUDA=require, but this version of mixkvq has no CUDA kernels")
    nvcc = shutil.which("nvcc") if wanted == "auto" else None
    if nvcc:  # may be a wrapper script: ask it where its toolkit is
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        top = re.search(r"\bTOP=(.+)", dry.stderr)
        if dry.returncode or not top:
            sys.exit(f"{nvcc} --dryrun failed: repair it or set MIXKVQ_CUDA=off\n{dry.stderr}")
        say(f"CUDA toolkit in {Path(top[1].strip()).resolve()} not used: this version has no CUDA kernels")


def extensions():
    import numpy  # in build-system.requires

    check_cuda()
    torch = torch_build()
    macros = [("Py_LIMITED_API", LIMITED_API), ("MKVQ_VERSION", f'"{version()}"')]
    built = [("MKVQ_BUILT_TORCH", f'"{torch[1]}"'), ("MKVQ_TORCH_TARGET", f'"{TORCH_TARGET}"')] if torch else []
    sources = sorted(str(path) for folder in ("csrc", "csrc/cpu", "csrc/bind") for path in Path(folder).glob("*.c"))
    other = {isa for machine, isas in ISA_FLAGS.items() if machine != target_machine() for isa in isas}
    core = Extension(
        "mixkvq._core",
        [source for source in sources if isa_of(source) not in other],
        include_dirs=["csrc", numpy.get_include()],
        define_macros=macros + built + [("MKVQ_SIMDE", "1")] * SIMDE,
    )
    if not torch:
        return [core]
    return [
        core,
        Extension(
            "mixkvq._torch",
            ["csrc/bind/torch_ops.cpp"],
            include_dirs=["csrc"],
            define_macros=[*macros, ("TORCH_TARGET_VERSION", TORCH_TARGET_MACRO)],
            extra_compile_args=["-isystem", str(torch[0] / "include")],
            extra_link_args=[f"-L{torch[0] / 'lib'}", "-ltorch_cpu"],
            language="c++",
        ),
    ]


# ---- compiling -----------------------------------------------------------------------------------------------------
def isa_of(source):
    return Path(source).stem.removeprefix("kernels_")


def tool(language="c"):
    name, default = ("CXX", "c++") if language == "c++" else ("CC", "cc")
    return shlex.split(os.environ.get(name) or default)


@cache
def target_machine():
    """Architecture that the C compiler makes code for, which need not be this machine's."""
    target = subprocess.run([*tool(), "-dumpmachine"], check=True, capture_output=True, text=True).stdout
    machine = target.partition("-")[0].strip()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def environment_flags(name):
    return shlex.split(os.environ.get(name, ""))


def run(command, target, inputs):
    """Run a command that makes `target`, unless the same command made it after the last change of all `inputs`."""
    target, note, line = Path(target), Path(f"{target}.command"), shlex.join(command)
    made = target.stat().st_mtime_ns if target.exists() and note.exists() and note.read_text() == line else 0
    if made and all(os.path.exists(path) and os.stat(path).st_mtime_ns <= made for path in inputs):
        return
    print(line + "\n", end="", flush=True)  # in one piece: compilers run side by side
    target.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    subprocess.run(command, check=True)
    note.write_text(line)


def compile_one(ext, source, folder):
    """Object of one source file; the compiler's own dependency file says which headers it depends on."""
    target = folder / ext.name / f"{Path(source).stem}.o"
    if ext.language == "c++":
        flags = [*CXX_FLAGS, *environment_flags("CXXFLAGS")]
    else:
        isa = ISA_FLAGS.get(target_machine(), {}).get(isa_of(source), [])
        flags = [*C_FLAGS, *isa, *environment_flags("CFLAGS")]
    includes = [f"-I{folder}" for folder in (*ext.include_dirs, sysconfig.get_path("include"))]
    macros = [f"-D{name}={value}" for name, value in ext.define_macros]
    depends = target.with_suffix(".d")
    known = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split() if depends.exists() else [source]
    flags += [*ext.extra_compile_args, *includes, *macros]
    run([*tool(ext.language), *flags, "-MMD", "-c", source, "-o", str(target)], target, known)
    return str(target)


class Build(build_ext):
    def finalize_options(self):
        self.build_temp = self.build_temp or OBJECTS
        self.distribution.ext_modules[:] = extensions()
        super().finalize_options()

    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, ext):
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            folder = Path(self.build_temp)
            objects = list(pool.map(lambda source: compile_one(ext, source, folder), ext.sources))
        library = folder / self.get_ext_filename(ext.name)
        flags = [*ext.extra_link_args, *environment_flags("LDFLAGS")]
        run([*tool(ext.language), "-shared", *objects, *flags, "-o", str(library)], library, objects)
        self.place(library, self.get_ext_fullpath(ext.name))

    def run(self):
        super().run()
        self.place("csrc/mixkvq.h", Path(self.build_lib) / "mixkvq/include/mixkvq.h")  # for C and C++ users

    def place(self, source, target):
        self.mkpath(str(Path(target).parent))
        self.copy_file(str(source), str(target))


class Wheel(bdist_wheel):
    def get_tag(self):
        return ABI_TAG, "abi3", super().get_tag()[2]


setup(
    version=version(),
    ext_modules=[Extension("mixkvq._core", [])],  # decided in Build, so that an sdist needs neither NumPy nor torch
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
