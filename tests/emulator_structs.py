"""The structs of csrc/mixkvq.h for ctypes. `check` compares them with what the compiler made of the header."""

from __future__ import annotations

from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_uint16,
    c_void_p,
    sizeof,
)
from typing import Any


class Error(Structure):
    _fields_ = [("argument", c_char_p), ("allowed", c_char_p), ("value", c_int64)]


class View(Structure):
    _fields_ = [("data", c_void_p), ("shape", c_int64 * 4), ("stride", c_int64 * 4), ("dtype", c_int32)]


class Codec(Structure):
    INTEGERS = (
        "head_dim", "block_length", "dtype", "allocate", "key_group", "key_metadata", "key_range", "key_reference",
        "value_bits", "value_group", "value_metadata", "value_range", "value_rotation", "pattern_cost",
        "budget_columns", "n_patterns",
    )  # fmt: skip
    _fields_ = [
        *[(name, c_int32) for name in INTEGERS],
        ("threshold_high", c_float),
        ("threshold_low", c_float),
        ("patterns", c_uint16 * 6 * 16),
    ]


class History(Structure):
    _fields_ = [
        ("slab_base", c_void_p),
        ("slab_bytes", c_void_p),
        ("slabs", c_int64),
        ("place", c_void_p),
        ("place_stride", c_int64),
        ("blocks", c_void_p),
        ("mu", c_void_p),
        ("batch", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("checked", c_int32),
        ("block_tokens", c_int32),
        ("record_bytes", c_int64),
    ]


class Salience(Structure):
    _fields_ = [
        ("q", View),
        ("kv_heads", c_int32),
        ("power", c_int32),
        ("first", c_void_p),
        ("sum", c_void_p),
        ("executor", c_void_p),
    ]


class Pack(Structure):
    _fields_ = [
        ("codec", POINTER(Codec)),
        ("k", View),
        ("v", View),
        ("first", c_void_p),
        ("blocks", c_void_p),
        ("max_blocks", c_int64),
        ("importance", c_void_p),
        ("mu", c_void_p),
        ("has_mu", c_void_p),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("sizes", c_void_p),
        ("raised", c_void_p),
        ("executor", c_void_p),
    ]


class Unpack(Structure):
    _fields_ = [
        ("history", POINTER(History)),
        ("k", View),
        ("v", View),
        ("first", c_void_p),
        ("executor", c_void_p),
    ]


class Append(Structure):
    _fields_ = [("k", View), ("v", View), ("k_new", View), ("v_new", View), ("exact", c_void_p)]


class Attend(Structure):
    _fields_ = [
        ("q", View),
        ("out", View),
        ("history", POINTER(History)),
        ("k", View),
        ("v", View),
        ("exact", c_void_p),
        ("start", c_void_p),
        ("sink_length", c_int32),
        ("mask_kind", c_int32),
        ("mask", View),
        ("scaling", c_float),
        ("softcap", c_float),
        ("sink_logits", c_void_p),
        ("precision", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("executor", c_void_p),
    ]


MIRRORS: dict[str, Any] = {
    "mkvq_error": Error,
    "mkvq_view": View,
    "mkvq_codec": Codec,
    "mkvq_history": History,
    "mkvq_salience_args": Salience,
    "mkvq_pack_args": Pack,
    "mkvq_unpack_args": Unpack,
    "mkvq_append_args": Append,
    "mkvq_attend_args": Attend,
}


class _Sizes(Structure):  # of tests/emulator_sizes.c
    _fields_ = [("name", c_char_p), ("size", c_int64), ("last", c_int64)]


def check(library: CDLL) -> None:
    """Raises AssertionError where a mirror has another size, or another place of its last member, than the C struct."""
    for sizes, (name, mirror) in zip(
        (_Sizes * len(MIRRORS)).in_dll(library, "mkvq_struct_sizes"), MIRRORS.items(), strict=True
    ):
        last = getattr(mirror, mirror._fields_[-1][0]).offset
        found = (sizes.name.decode(), sizes.size, sizes.last)
        assert found == (name, sizeof(mirror), last), f"{found} in C, {(name, sizeof(mirror), last)} in {mirror}"
