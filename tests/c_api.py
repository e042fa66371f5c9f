"""The C interface of `mixkvq._core`, called as C does: the table that the module hands to other modules (mkvq_api)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from emulator_structs import Append, Attend, Codec, Error, History, Pack, Salience, Unpack, View

import mixkvq
from mixkvq import _core

_CHECKED: Callable[..., Any] = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(Error))


class _Table(Structure):
    _fields_ = [
        ("version", c_uint32),
        ("status_text", ctypes.CFUNCTYPE(c_char_p, c_int)),
        ("check_codec", _CHECKED),
        ("record_bound", ctypes.CFUNCTYPE(c_int64, POINTER(Codec))),
        ("inspect", ctypes.CFUNCTYPE(c_int, c_void_p, c_int64, c_void_p, POINTER(Error))),
        ("salience", _CHECKED),
        ("pack", _CHECKED),
        ("unpack", _CHECKED),
        ("append", _CHECKED),
        ("attend", _CHECKED),
        ("attend_workspace", ctypes.CFUNCTYPE(c_int64, POINTER(Attend))),
    ]


@cache
def table() -> Any:
    """The table itself."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return _Table.from_address(pointer(_core._C_API, b"mixkvq._core._C_API"))


def header() -> Path:
    """mixkvq.h: of the installed package, or of the sources."""
    installed = Path(mixkvq.__file__).parent / "include/mixkvq.h"
    return installed if installed.exists() else Path(__file__).resolve().parents[1] / "csrc/mixkvq.h"


def statuses() -> dict[str, int]:
    """The codes of mkvq_status."""
    body = re.search(r"typedef enum \{([^{}]*MKVQ_OK = 0[^{}]*)\} mkvq_status;", header().read_text())
    assert body is not None
    names = re.findall(r"^\s*(MKVQ_\w+)", re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL), re.MULTILINE)
    return {name: code for code, name in enumerate(names)}


def call(name: str, args: Structure | None) -> tuple[int, str]:
    """Status, and the argument that is to blame."""
    error = Error()
    status = getattr(table(), name)(None if args is None else byref(args), byref(error))
    return status, (error.argument or b"").decode()


def inspect(record: bytes | None, available: int | None = None, info: bool = True) -> tuple[int, str]:
    """As `call`."""
    error, room = Error(), ctypes.create_string_buffer(1024)
    size = len(record or b"") if available is None else available
    status = table().inspect(record, size, room if info else None, byref(error))
    return status, (error.argument or b"").decode()


# ---- arguments that are right --------------------------------------------------------------------------------------
class Arguments:
    """Of every call, for one row, one head and head_dim 16; change a field, then `call`.

    Attributes
    ----------
    codec, history, salience, pack, unpack, append, attend : Structure
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        integers = dict(zip(Codec.INTEGERS, (16, 32, 1, 0, 32, 0, 0, 1, 2, 16, 0, 0, 1, 0, 0, 1), strict=True))
        self.codec = Codec(**integers, threshold_high=1.0, threshold_low=0.5)
        self.codec.patterns[0][1] = 16
        self.history = History(blocks=self.of(np.zeros(1, np.int64)), batch=1, kv_heads=1, head_dim=16, place_stride=0)
        lengths, rng = np.zeros(1, np.int64), np.random.default_rng(0)
        view = lambda n: self.view(rng.standard_normal((1, 1, n, 16)).astype(np.float32))  # noqa: E731
        self.salience = Salience(q=view(3), kv_heads=1, power=2, sum=self.of(np.zeros(16)))
        bound = table().record_bound(byref(self.codec))
        room = np.zeros(bound + 64, np.uint8)
        self.pack = Pack(
            codec=ctypes.pointer(self.codec),
            k=view(32),
            v=view(32),
            first=self.of(lengths),
            blocks=self.of(lengths + 1),
            max_blocks=1,
            mu=self.of(np.zeros(16, np.uint16)),
            has_mu=self.of(np.zeros(1, np.uint8)),
            out=self.of(room) + -room.ctypes.data % 64,
            out_stride=bound,
            sizes=self.of(lengths),
        )
        history = ctypes.pointer(self.history)
        self.unpack = Unpack(history=history, k=view(8), v=view(8), first=self.of(lengths))
        self.append = Append(k=view(8), v=view(8), k_new=view(2), v_new=view(2), exact=self.of(lengths.copy()))
        self.attend = Attend(
            q=view(2), out=view(2), history=history, k=view(8), v=view(8), exact=self.of(lengths + 8), scaling=0.25
        )

    def of(self, array: np.ndarray) -> int:
        """Address of an array, which lives as long as this."""
        self.arrays.append(array)
        return int(array.ctypes.data)

    def view(self, array: np.ndarray) -> View:
        """A dense float32 array."""
        strides = [stride // array.itemsize for stride in array.strides]
        return View(data=self.of(array), shape=(c_int64 * 4)(*array.shape), stride=(c_int64 * 4)(*strides), dtype=1)

    def call(self, name: str) -> tuple[int, str]:
        """Status and argument to blame of one call; "codec" is the check of a codec."""
        return call("check_codec" if name == "codec" else name, getattr(self, name))
