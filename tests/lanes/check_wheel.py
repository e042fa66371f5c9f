"""Checks of a wheel's contents, tags and symbols, for `wheel.sh`: python check_wheel.py WHEEL SOURCES GLIBC [--cuda].

Every file of the package and none besides (--cuda: with `_cuda`); RECORD; tags that agree; libraries that need no newer
glibc than GLIBC, no folder of the building machine, no library of CUDA, and no symbol of torch that is not of its
stable C interface.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import sys
import textwrap
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from elftools.elf.elffile import ELFFile

LIBRARIES = {  # that each may need
    "_core": {"libc.so.6", "libm.so.6"},
    "_torch": {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libtorch_cpu.so"},
    "_cuda": {"libc.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"},
}
ORIGINS = {  # of undefined symbols: by the version that they ask for, or by name where they ask for none
    "libc": r".+@GLIBC_[\d.]+",
    "libstdc++": r".+@(GLIBCXX|CXXABI)_[\d.]+",
    "libgcc": r".+@GCC_[\d.]+",
    "Python": r"_?Py\w+",
    "torch, stable C interface": r"(aoti_)?torch_\w+",
    "optional": r"__gmon_start__|__cxa_finalize|_ITM_\w+",
}


def require(condition: object, message: str) -> None:
    if not condition:
        sys.exit(f"check_wheel: {message}")


# ---- files ---------------------------------------------------------------------------------------------------------
def files_of(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if not name.endswith("/")]


def check_record(wheel: zipfile.ZipFile, folder: str) -> None:
    """RECORD lists every file once, with its size and SHA-256."""
    rows = list(csv.reader(io.StringIO(wheel.read(f"{folder}/RECORD").decode())))
    require(sorted(row[0] for row in rows) == sorted(files_of(wheel)), "RECORD and the archive list different files")
    for name, digest, size in rows:
        data = wheel.read(name)
        actual = "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        require(name.endswith("/RECORD") or (digest, size) == (actual, str(len(data))), f"RECORD is wrong about {name}")


def check_files(names: list[str], sources: Path, folder: str) -> None:
    """The package's modules, the libraries, the headers, the licence and what describes them."""
    modules = {str(path.relative_to(sources)) for path in (sources / "mixkvq").rglob("*.py*") if path.suffix != ".pyc"}
    built = {"_core.abi3.so", "_torch.abi3.so", "py.typed", "include/mixkvq.h", "include/cuda/mixkvq_cuda.h"}
    built |= {"_cuda.abi3.so"} if "--cuda" in sys.argv else set()
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    wanted = modules | {f"mixkvq/{name}" for name in built} | {f"{folder}/{name}" for name in about}
    require("mixkvq/_core.pyi" in wanted, "the sources lack mixkvq/_core.pyi")
    require(wanted <= set(names), f"the wheel lacks {sorted(wanted - set(names))}")
    require(set(names) <= wanted, f"the wheel holds too much: {sorted(set(names) - wanted)}")


def check_tags(path: Path, wheel: zipfile.ZipFile, folder: str, version: str, glibc: str) -> None:
    """The name and the file WHEEL claim the same; the glibc claimed is no newer than `glibc`."""
    pattern = rf"mixkvq-{re.escape(version)}-cp311-abi3-(.+)\.whl"
    found = re.fullmatch(pattern, path.name)
    require(found, f"{path.name} does not match {pattern}")
    tags = re.findall(r"^Tag: cp311-abi3-(.+)$", wheel.read(f"{folder}/WHEEL").decode(), re.MULTILINE)
    require(sorted(found[1].split(".")) == sorted(tags), f"{path.name} has the tags {tags}")
    claimed = [tuple(map(int, pair)) for pair in re.findall(r"manylinux_(\d+)_(\d+)_", found[1])]
    require(claimed, f"{path.name} is for no manylinux")
    require(
        max(claimed) <= tuple(map(int, glibc.split("."))),
        f"{path.name} needs a newer glibc or libstdc++ than manylinux_{glibc} has: a newer compiler's headers ask for "
        "more than csrc/bind/runtime.cpp provides",
    )
    metadata = wheel.read(f"{folder}/METADATA").decode()
    require(f"\nVersion: {version}\n" in metadata, f"METADATA is not of version {version}")


# ---- libraries -----------------------------------------------------------------------------------------------------
def undefined_symbols(elf: ELFFile) -> Iterator[str]:
    """Names, with @VERSION where a version is asked for."""
    versions = {
        auxiliary["vna_other"]: auxiliary.name
        for _, auxiliaries in elf.get_section_by_name(".gnu.version_r").iter_versions()
        for auxiliary in auxiliaries
    }
    asked = elf.get_section_by_name(".gnu.version")
    for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if symbol.name and symbol["st_shndx"] == "SHN_UNDEF":
            version = versions.get(asked.get_symbol(index)["ndx"])
            yield f"{symbol.name}@{version}" if version else symbol.name


def exported_symbols(elf: ELFFile) -> list[str]:
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    return [symbol.name for symbol in symbols if symbol.name and symbol["st_shndx"] != "SHN_UNDEF"]


def origin(symbol: str) -> str:
    return next((name for name, pattern in ORIGINS.items() if re.fullmatch(pattern, symbol)), "unknown")


def check_library(name: str, data: bytes) -> None:
    elf = ELFFile(io.BytesIO(data))
    dynamic = list(elf.get_section_by_name(".dynamic").iter_tags())
    paths = [tag for tag in dynamic if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    require(not paths, f"{name} has a search path of its own: {paths}")
    needed = {tag.needed for tag in dynamic if tag.entry.d_tag == "DT_NEEDED"}
    module = Path(name).name.partition(".")[0]
    require(needed <= LIBRARIES[module], f"{name} needs {sorted(needed)}")
    entry = f"PyInit_{module}"
    require(exported_symbols(elf) == [entry], f"{name} exports {exported_symbols(elf)}, must export {entry} alone")
    headers = re.search(rb"[^\0]*/(torch|cuda[^/\0]*)/include/[^\0]*", data)
    require(not headers, f"{name} names a file of the building machine: {headers and headers[0]!r}")

    undefined = sorted(undefined_symbols(elf))
    unknown = [symbol for symbol in undefined if origin(symbol) == "unknown"]
    require(not unknown, f"{name} needs symbols that are not of a stable interface: {unknown}")
    torch = [symbol for symbol in undefined if origin(symbol).startswith("torch")]
    require(bool(torch) == ("_torch" in name), f"{name} needs these symbols of torch: {torch}")
    print(f"{name}: {len(data):,} bytes, leaves undefined")
    for where, count in Counter(map(origin, undefined)).items():
        versions = {symbol.partition("@")[2] for symbol in undefined if origin(symbol) == where} - {""}
        print(f"    {count} of {where}", *sorted(versions, key=lambda text: [int(n) for n in re.findall(r"\d+", text)]))
    if torch:
        print(textwrap.fill(" ".join(torch), 120, initial_indent=" " * 8, subsequent_indent=" " * 8))


def main() -> None:
    path, sources, glibc = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    version = re.search(r'__version__ = "(.+)"', (sources / "mixkvq/version.py").read_text())[1]
    folder = f"mixkvq-{version}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        require(wheel.testzip() is None, f"{path} is damaged")
        check_tags(path, wheel, folder, version, glibc)
        check_files(files_of(wheel), sources, folder)
        check_record(wheel, folder)
        for name in files_of(wheel):
            if name.endswith(".so"):
                check_library(name, wheel.read(name))
        print(f"{path.name}: {path.stat().st_size:,} bytes, {len(files_of(wheel))} files")


main()
