"""Linker flags for libraries that must load beside an older glibc: python old_glibc.py ARCHIVE FOLDER NEWEST.

glibc 2.34 moved pthread_*, sem_*, dl* and shm_* into libc.so.6, under new versions, so that what is linked here against
an archive that calls them (the CUDA runtime) asks for glibc 2.34. The old versions are there still. This makes
stand-ins of libpthread.so.0, libdl.so.2 and librt.so.1 with the versions from before NEWEST, of just the symbols that
ARCHIVE leaves undefined, and prints the flags that link against them; nothing where the libraries are old enough.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

LIBRARIES = {r"(pthread|sem)_": "libpthread.so.0", r"dl": "libdl.so.2", r"shm_": "librt.so.1"}
CC = shlex.split(os.environ.get("CC") or "cc")


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def number(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in version.split("."))


def versions(symbol: str, libc: str) -> tuple[str, list[str]]:
    """The one that the linker takes, and older ones."""
    found = re.findall(rf" {symbol}(@@?)GLIBC_([\d.]+)$", libc, re.MULTILINE)
    default = next((version for at, version in found if at == "@@"), "0")
    return default, sorted((version for at, version in found if at == "@"), key=number)


def main() -> None:
    archive, folder, newest = sys.argv[1], Path(sys.argv[2]), number(sys.argv[3])
    libc = output("nm", "-D", "--defined-only", output(*CC, "-print-file-name=libc.so.6").strip())
    wanted: dict[str, dict[str, list[str]]] = {}
    for symbol in sorted(set(re.findall(r" U (\w+)$", output("nm", "-u", archive), re.MULTILINE))):
        library = next((name for prefix, name in LIBRARIES.items() if re.match(prefix, symbol)), None)
        default, older = versions(symbol, libc)
        old = [version for version in older if number(version) <= newest]
        if library and old and number(default) > newest:
            wanted.setdefault(library, {}).setdefault(old[-1], []).append(symbol)
    folder.mkdir(parents=True, exist_ok=True)
    for library, of in wanted.items():
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("".join(f"void {symbol}(void) {{}}\n" for symbols in of.values() for symbol in symbols))
        script.write_text("".join(f"GLIBC_{version} {{ {'; '.join(symbols)}; }};\n" for version, symbols in of.items()))
        names = [f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        output(*CC, "-shared", "-nostdlib", "-fno-builtin", "-w", *names, str(source), "-o", str(folder / library))
    if wanted:
        print(f"-L{folder} -Wl,--as-needed", *(f"-l:{library}" for library in wanted), "-Wl,--no-as-needed")


main()
