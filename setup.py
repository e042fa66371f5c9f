"""Builds mixkvq._core (C11); where torch is installed, mixkvq._torch (C++ on the LibTorch stable ABI); where nvcc is
found, mixkvq._cuda (docs/cuda-kernels.md).

Environment
    MIXKVQ_TORCH, MIXKVQ_CUDA   auto (default): build what the tools found allow; require: fail without; off: don't look
    MIXKVQ_CUDA_ARCHS           what to make machine code for, such as "90a"; 100+ptx: also code for later GPUs
    MIXKVQ_WERROR=1             warnings are errors
    MIXKVQ_SIMDE=1              AVX-512 kernels over SIMDe, which run on any AVX2 machine: for tests, not for speed
    CC, CXX, NVCC, CUDA_HOME, CFLAGS, CXXFLAGS, NVCCFLAGS, LDFLAGS, MAX_JOBS   as usual

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
from dataclasses import dataclass
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
CUDA_MODULE = "csrc/bind/cuda_module.c"
CUDA_ARCHS = "80 86 89 90a 100+ptx"
# without exceptions and guarded statics the module needs nothing of libstdc++
CUDA_HOST = ["-Wall", "-Wextra", *HIDDEN, "-fno-exceptions", "-fno-threadsafe-statics"]
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xptxas", "-v", "-Xcompiler", ",".join(CUDA_HOST)]


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
        say(f"not building mixkvq._torch ({reason}): torch.compile will need it, all else works without")
        return None
    found = re.search(r"__version__ = '(.+)'", (folder / "version.py").read_text())[1]
    if tuple(int(n) for n in re.findall(r"\d+", found)[:2]) < tuple(int(n) for n in TORCH_TARGET.split(".")):
        sys.exit(f"torch {found} in {folder} is too old (>= {TORCH_TARGET}): update it or set MIXKVQ_TORCH=off")
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        sys.exit(f"torch {found} in {folder} has no C++ headers: reinstall it or set MIXKVQ_TORCH=off")
    say(f"building mixkvq._torch (torch {found} in {folder})")
    return folder, found


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: str
    include: Path
    library: Path
    machine: tuple[str, ...]  # parts to make machine code for, such as "90a"
    later: tuple[str, ...]  # parts for whose successors to add PTX

    def __str__(self):
        codes = [f"sm_{part}" for part in self.machine] + [f"compute_{part}" for part in self.later]
        return f"CUDA {self.version}: {' '.join(codes)}"

    def flags(self):
        machine = [f"arch=compute_{part},code=sm_{part}" for part in self.machine]
        return [f"-gencode={code}" for code in machine + [f"arch=compute_{p},code=compute_{p}" for p in self.later]]


def find_nvcc():
    home = os.environ.get("CUDA_HOME")
    return os.environ.get("NVCC") or shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))


def cuda_toolkit():
    """The toolkit to build mixkvq._cuda with, or None."""
    wanted = mode("MIXKVQ_CUDA")
    nvcc = find_nvcc() if wanted != "off" else None
    if not nvcc:
        if wanted == "require":
            sys.exit("MIXKVQ_CUDA=require, but nvcc is not found: put it on PATH or name it in NVCC")
        say(f"not building mixkvq._cuda ({'MIXKVQ_CUDA=off' if wanted == 'off' else 'nvcc is not found'})")
        return None
    repair = "repair it or set MIXKVQ_CUDA=off"

    def ask(*arguments):
        try:
            answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True)
        except OSError as error:
            sys.exit(f"{nvcc} cannot be run: {repair}\n{error}")
        if answer.returncode:
            sys.exit(f"{nvcc} {arguments[0]} failed: {repair}\n{answer.stderr}")
        return answer.stdout + answer.stderr

    # nvcc may be a wrapper script, whose place says nothing
    top = re.search(r"\bTOP=(.+)", ask("--dryrun", "-c", "x.cu"))
    release = re.search(r"release ((\d+)\.\d+)", ask("--version"))
    if not top or not release:
        sys.exit(f"{nvcc} names no toolkit or no release: {repair}")
    if int(release[2]) < 12:
        sys.exit(f"{nvcc} is of CUDA {release[1]}, which knows no C++20 (>= 12.0): update it or set MIXKVQ_CUDA=off")
    root = Path(top[1].strip()).resolve()

    def folder(file, *names):
        places = [place / name for place in (root, root / f"targets/{target_machine()}-linux") for name in names]
        found = [place for place in places if (place / file).exists()]
        return found[0] if found else sys.exit(f"the CUDA toolkit in {root} has no {file}: {repair}")

    known = {int(part) for part in re.findall(r"\bsm_(\d+)", ask("--list-gpu-code"))}
    include, library = folder("cuda_runtime_api.h", "include"), folder("libcudart_static.a", "lib64", "lib")
    toolkit = Toolkit(nvcc, release[1], include, library, *cuda_parts(known))
    say(f"building mixkvq._cuda ({toolkit}; toolkit in {root})")
    return toolkit


def cuda_parts(known):
    """(parts to make machine code for, parts to add PTX of), of those whose numbers this nvcc knows."""
    asked = os.environ.get("MIXKVQ_CUDA_ARCHS")
    wanted = (asked or CUDA_ARCHS).split()
    names = {name: re.fullmatch(r"(\d+)[a-z]?(\+ptx)?", name) for name in wanted}
    there = [name for name, match in names.items() if match and int(match[1]) in known]
    absent = [name for name in wanted if name not in there]
    if not there or (asked and absent):
        allowed = f"of {' '.join(map(str, sorted(known)))} in this nvcc, with an a or +ptx behind it where that exists"
        sys.exit(f"MIXKVQ_CUDA_ARCHS names {' '.join(absent) or 'nothing'}, must be {allowed}")
    machine = [name.removesuffix("+ptx") for name in there]
    later = [name.removesuffix("+ptx") for name in there if name.endswith("+ptx")]
    if absent:
        say(f"this nvcc has no {' '.join(absent)}: newer parts get PTX of {machine[-1]}")
        later = [machine[-1].rstrip("a")]
    return tuple(machine), tuple(later)


def extensions():
    import numpy  # in build-system.requires

    torch, cuda = torch_build(), cuda_toolkit()
    macros = [("Py_LIMITED_API", LIMITED_API), ("MKVQ_VERSION", f'"{version()}"')]
    built = [("MKVQ_BUILT_TORCH", f'"{torch[1]}"'), ("MKVQ_TORCH_TARGET", f'"{TORCH_TARGET}"')] if torch else []
    built += [("MKVQ_BUILT_CUDA", f'"{cuda}"')] if cuda else []
    core = Extension(
        "mixkvq._core",
        [source for source in sources("csrc/*.c", "csrc/cpu/*.c", "csrc/bind/*.c") if belongs_to_core(source)],
        include_dirs=["csrc", numpy.get_include()],
        define_macros=macros + built + [("MKVQ_SIMDE", "1")] * SIMDE,
        extra_link_args=["-lm"],
    )
    return [
        core,
        *([torch_extension(torch[0], macros)] if torch else []),
        *([cuda_extension(cuda, macros + built)] if cuda else []),
    ]


def sources(*patterns):
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def belongs_to_core(source):
    other = {isa for machine, isas in ISA_FLAGS.items() if machine != target_machine() for isa in isas}
    return isa_of(source) not in other and source != CUDA_MODULE


def torch_extension(folder, macros):
    include = folder / "include"
    return Extension(
        "mixkvq._torch",
        ["csrc/bind/torch_ops.cpp", "csrc/bind/runtime.cpp"],
        include_dirs=["csrc"],
        define_macros=[*macros, ("TORCH_TARGET_VERSION", TORCH_TARGET_MACRO)],
        # the headers name themselves in messages: as torch/..., whatever folder they lie in here
        extra_compile_args=["-isystem", str(include), f"-fmacro-prefix-map={include}/="],
        extra_link_args=["-Wl,--version-script=csrc/bind/torch.map", f"-L{folder / 'lib'}", "-ltorch_cpu"],
        language="c++",
    )


def cuda_extension(toolkit, macros):
    """Kernels, the checks of the core that they share, and the CUDA runtime itself: it finds the driver when called."""
    ext = Extension(
        "mixkvq._cuda",
        [*sources("csrc/cuda/*.cu", "csrc/*.c"), CUDA_MODULE],
        include_dirs=["csrc"],
        define_macros=macros,
        extra_compile_args=["-isystem", str(toolkit.include)],
        extra_link_args=[
            "-Wl,--version-script=csrc/bind/cuda.map,-s",  # nvcc names symbols after its temporary files
            *[f"-L{toolkit.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        ],
    )
    ext.toolkit = toolkit
    return ext


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


def jobs():
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def run(command, target, inputs, log=None):
    """Run a command that makes `target`, unless the same command made it after the last change of all `inputs`."""
    target, note, line = Path(target), Path(f"{target}.command"), shlex.join(command)
    there = all(path.exists() for path in (target, note, log or note))
    made = target.stat().st_mtime_ns if there and note.read_text() == line else 0
    if made and all(os.path.exists(path) and os.stat(path).st_mtime_ns <= made for path in inputs):
        return
    print(line + "\n", end="", flush=True)  # in one piece: compilers run side by side
    target.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    if log:
        with log.open("w") as output:
            failed = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
        if failed:
            sys.exit(log.read_text())
    else:
        subprocess.run(command, check=True)
    note.write_text(line)


def compile_one(ext, source, folder):
    """Object of one source file; the compiler's own dependency file says which headers it depends on."""
    if source.endswith(".cu"):
        return compile_cuda(ext, source, Path(str(folder).removesuffix("-werror")))  # takes minutes: once is enough
    target = folder / ext.name / f"{Path(source).stem}.o"
    compile_after_change([*tool(ext.language), *flags_of(ext, source)], source, target)
    return str(target)


def compile_after_change(command, source, target, log=None):
    depends = target.with_suffix(".d")
    known = depends.read_text().split(":", 1)[1].replace("\\\n", " ").split() if depends.exists() else [source]
    run([*command, "-MMD", "-MF", str(depends), "-c", source, "-o", str(target)], target, known, log)


def compile_cuda(ext, source, folder):
    """What nvcc says, of warnings and of the registers of every kernel, lies in a file beside the object."""
    target = folder / ext.name / f"{Path(source).stem}.o"
    host = ["-ccbin", tool("c++")[0]] if os.environ.get("CXX") else []
    flags = [*CUDA_FLAGS, *environment_flags("NVCCFLAGS"), *host, *ext.toolkit.flags()]
    command = [ext.toolkit.nvcc, *flags, "--threads", str(jobs())]
    log = target.with_suffix(".log")
    compile_after_change(command, source, target, log)
    warnings = [line for line in log.read_text().splitlines() if re.search(r"\bwarning\b", line)]
    print("".join(f"{line}\n" for line in warnings), end="", flush=True)
    if warnings and WERROR:
        sys.exit(f"MIXKVQ_WERROR=1, and {log} has warnings")
    return str(target)


def flags_of(ext, source):
    if ext.language == "c++":
        flags = [*CXX_FLAGS, *environment_flags("CXXFLAGS")]
    else:
        isa = ISA_FLAGS.get(target_machine(), {}).get(isa_of(source), [])
        flags = [*C_FLAGS, *isa, *environment_flags("CFLAGS")]
    includes = [f"-I{folder}" for folder in (*ext.include_dirs, sysconfig.get_path("include"))]
    # what was built is of no use to other files, which would be compiled again
    untold = () if source.endswith("_module.c") else ("MKVQ_BUILT", "MKVQ_TORCH")
    macros = [f"-D{name}={value}" for name, value in ext.define_macros if not name.startswith(untold)]
    return [*flags, *ext.extra_compile_args, *includes, *macros]


class Build(build_ext):
    def finalize_options(self):
        self.build_temp = self.build_temp or OBJECTS
        self.distribution.ext_modules[:] = extensions()
        super().finalize_options()

    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".abi3.so"

    def build_extension(self, ext):
        with ThreadPoolExecutor(jobs()) as pool:
            folder = Path(self.build_temp)
            objects = list(pool.map(lambda source: compile_one(ext, source, folder), ext.sources))
        library = folder / self.get_ext_filename(ext.name)
        flags = [*ext.extra_link_args, *environment_flags("LDFLAGS")]
        run([*tool(ext.language), "-shared", *objects, *flags, "-o", str(library)], library, objects)
        self.place(library, self.get_ext_fullpath(ext.name))

    def run(self):
        super().run()
        for header in ("mixkvq.h", "cuda/mixkvq_cuda.h"):  # for C and C++ users
            self.place(f"csrc/{header}", Path(self.build_lib) / "mixkvq/include" / header)

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
