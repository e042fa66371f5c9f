"""Which kernels run? As a script: children of this process overwrite kernels with an undefined instruction, then call
every kernel of the core. Prints as JSON how each child ended: {what was broken: 0, or minus the signal that ended it}.

Kernels are found from outside, through the symbols of the library: `mkvq_kernels_<isa>` is a table of a name and one
pointer per kernel (csrc/core.h).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import subprocess

import numpy as np

from mixkvq import _core, arrays
from mixkvq.config import MixKVQConfig

UNDEFINED = {"x86_64": bytes.fromhex("0f0b"), "aarch64": bytes(4)}  # ud2, udf #0


def kernel_tables() -> dict[str, list[int]]:
    """Addresses of the kernels of every level."""
    listing = subprocess.run(["nm", "-S", _core.__file__], capture_output=True, text=True, check=True).stdout
    fields = [line.split() for line in listing.splitlines()]
    symbols = {f[3]: (int(f[0], 16), int(f[1], 16)) for f in fields if len(f) == 4}
    known = ctypes.cast(ctypes.CDLL(_core.__file__).PyInit__core, ctypes.c_void_p).value
    assert known is not None
    base = known - symbols["PyInit__core"][0]
    tables = {}
    for name, (offset, size) in symbols.items():
        if name.startswith("mkvq_kernels_"):
            pointers = (ctypes.c_void_p * (size // 8)).from_address(base + offset)
            tables[ctypes.string_at(pointers[0] or 0).decode()] = [p or 0 for p in pointers[1:]]
    return tables


def destroy(address: int) -> None:
    """Makes the function at `address` end its process with SIGILL."""
    page = address & -mmap.PAGESIZE
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), everything):
        raise OSError(ctypes.get_errno(), "mprotect")
    code = UNDEFINED[platform.machine()]
    ctypes.memmove(address, code, len(code))


def call_every_kernel() -> None:
    k, v, q = np.random.default_rng(0).standard_normal((3, 1, 2, 128, 64), np.float32)
    for allocate in ("patterns", "layer"):
        config = MixKVQConfig.preset("default", allocate=allocate, key_budget=3.0)
        packed = arrays.pack(config.codec(64, "float32"), k, v)
    arrays.unpack(packed.records[0][0][0], mu=packed.mu[0, 0])
    arrays.salience(q, 2, power=2)
    arrays.attend(q[:, :, :1], packed.records, k, v, [100], mu=packed.mu)


def outcome(broken: list[int]) -> int:
    child = os.fork()
    if child == 0:
        for address in broken:
            destroy(address)
        call_every_kernel()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    tables = kernel_tables()
    own = tables.pop(_core.isa())
    outcomes = {"nothing": outcome([]), "other levels": outcome([p for table in tables.values() for p in table])}
    outcomes |= {f"kernel {i}": outcome([address]) for i, address in enumerate(own)}
    print(json.dumps(outcomes))
