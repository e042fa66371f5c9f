"""Every status code of mixkvq.h is returned by a call, and says something of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import c_api
import pytest
from c_api import Arguments, statuses

import mixkvq
from mixkvq import _core

RECORD = bytes.fromhex("4d4b5651 01 01 01 00 0800 0100 0000 0000 00 00 0000 80000000 0000000000000000".replace(" ", ""))
RECORD += bytes(128 - len(RECORD))
"""An exact record of one token, head_dim 8, float32."""


def changed(at: int, value: int) -> bytes:
    """The record with another byte."""
    return RECORD[:at] + bytes([value]) + RECORD[at + 1 :]


def with_field(call: str, field: str, value: object) -> tuple[int, str]:
    """A right call with one wrong field."""
    arguments = Arguments()
    setattr(getattr(arguments, call), field, value)
    return arguments.call(call)


def with_dtype(call: str, view: str, dtype: int) -> tuple[int, str]:
    arguments = Arguments()
    getattr(getattr(arguments, call), view).dtype = dtype
    return arguments.call(call)


def without_instruction_set() -> tuple[int, str]:
    """The core's answer has no way to Python but this."""
    with pytest.raises(ValueError, match=r"name is 'sse9', must be one of scalar"):
        _core.set_isa("sse9")
    return statuses()["MKVQ_E_ISA"], "name"


NO_DEVICE = """
import ctypes
from c_api import Arguments
from emulator_structs import Error
from mixkvq import _cuda
pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
functions = ctypes.cast(pointer(_cuda._C_API, b"mixkvq._cuda._C_API"), ctypes.POINTER(ctypes.c_void_p))
append = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(functions[4])
error, arguments = Error(), Arguments()
status = append(ctypes.addressof(arguments.append), None, ctypes.addressof(error))
print(status, error.argument.decode(), error.value)
"""


def without_device() -> tuple[int, str]:
    """CUDA kernels where no GPU is seen."""
    if not (Path(_core.__file__).parent / "_cuda.abi3.so").exists():
        pytest.skip("mixkvq._cuda, the only one that returns it, was not built")
    path = os.pathsep.join((str(Path(mixkvq.__file__).parents[1]), str(Path(__file__).parent)))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-P", "-c", NO_DEVICE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status, argument = done.stdout.split(maxsplit=1)
    return int(status), argument.strip()


CALLS: dict[str, tuple[Callable[[], tuple[int, str]], str]] = {
    "MKVQ_OK": (lambda: Arguments().call("attend"), ""),
    "MKVQ_E_NULL": (lambda: with_field("salience", "sum", None), "sum"),
    "MKVQ_E_DTYPE": (lambda: with_dtype("attend", "q", 4), "q"),
    "MKVQ_E_SHAPE": (lambda: with_field("salience", "kv_heads", 2), "kv_heads"),
    "MKVQ_E_VALUE": (lambda: with_field("codec", "value_bits", 5), "value_bits"),
    "MKVQ_E_SPACE": (lambda: with_field("pack", "out_stride", 64), "out_stride"),
    "MKVQ_E_MAGIC": (lambda: c_api.inspect(changed(0, 0)), "record"),
    "MKVQ_E_VERSION": (lambda: c_api.inspect(changed(4, 2)), "record version"),
    "MKVQ_E_RECORD": (lambda: c_api.inspect(changed(5, 2)), "record kind"),
    "MKVQ_E_ISA": (without_instruction_set, "name"),
    "MKVQ_E_DEVICE": (without_device, "CUDA error"),
}
"""A call that returns the code, and the argument that it blames."""


@pytest.mark.parametrize("name", statuses())
def test_every_status_is_returned(name):
    """A code that is added to mixkvq.h needs a call here."""
    assert name in CALLS, f"no test returns {name}"
    make, argument = CALLS[name]
    status, blamed = make()
    assert status == statuses()[name] and blamed.startswith(argument) and bool(blamed) == bool(argument)


def test_every_status_has_a_text_of_its_own():
    text = c_api.table().status_text
    texts = [text(code).decode() for code in statuses().values()]
    assert len(set(texts)) == len(texts) == len(CALLS) and "unknown status" not in texts
    assert text(len(texts)) == text(-1) == b"unknown status"


def test_the_record_of_these_tests_is_one():
    assert c_api.inspect(RECORD) == (0, "") and _core.inspect(RECORD)["tokens"] == 1
    assert ctypes.sizeof(c_api.Error) == 24 and c_api.table().version == 3
