"""Checks of check.c that no Python call reaches, called as C does: missing addresses, single wrong arguments."""

from __future__ import annotations

import c_api
import pytest
from c_api import Arguments, statuses

CALLS = ("salience", "pack", "unpack", "append", "attend")
NULL, DTYPE, SHAPE, VALUE, SPACE = (
    statuses()[f"MKVQ_E_{name}"] for name in ("NULL", "DTYPE", "SHAPE", "VALUE", "SPACE")
)


@pytest.mark.parametrize("call", (*CALLS, "check_codec"))
def test_no_arguments(call):
    assert c_api.call(call, None)[0] == NULL


@pytest.mark.parametrize("call", (*CALLS, "codec"))
def test_right_arguments_are_taken(call):
    assert Arguments().call(call) == (0, "")


@pytest.mark.parametrize(
    ("call", "field", "value", "status", "blamed"),
    [
        ("salience", "power", 3, VALUE, "power"),
        ("pack", "codec", None, NULL, "codec"),
        ("pack", "max_blocks", -1, VALUE, "max_blocks"),
        ("pack", "first", None, NULL, "blocks"),
        ("pack", "blocks", None, NULL, "blocks"),
        ("pack", "out", None, NULL, "out"),
        ("pack", "sizes", None, NULL, "out"),
        ("pack", "mu", None, NULL, "mu"),
        ("pack", "has_mu", None, NULL, "mu"),
        ("unpack", "history", None, NULL, "history"),
        ("unpack", "first", None, NULL, "first"),
        ("append", "exact", None, NULL, "exact"),
        ("attend", "history", None, NULL, "history"),
        ("attend", "exact", None, NULL, "exact"),
        ("attend", "mask_kind", 3, VALUE, "mask_kind"),
        ("attend", "mask_kind", 2, DTYPE, "mask"),
        ("attend", "precision", 3, VALUE, "precision"),
        ("attend", "workspace", 2, VALUE, "workspace"),
        ("history", "blocks", None, NULL, "blocks"),
        ("history", "kv_heads", 0, SHAPE, "history kv_heads"),
        ("history", "head_dim", 12, SHAPE, "head_dim"),
        ("codec", "key_metadata", 2, VALUE, "key_metadata"),
        ("codec", "key_range", 3, VALUE, "key_range"),
        ("codec", "key_reference", 2, VALUE, "key_reference"),
        ("codec", "value_metadata", 2, VALUE, "value_metadata"),
        ("codec", "value_range", 3, VALUE, "value_range"),
        ("codec", "value_rotation", 2, VALUE, "value_rotation"),
        ("codec", "pattern_cost", 2, VALUE, "pattern_cost"),
        ("codec", "allocate", 5, VALUE, "allocate"),
        ("codec", "n_patterns", 0, VALUE, "n_patterns"),
    ],
)
def test_one_wrong_argument(call, field, value, status, blamed):
    arguments = Arguments()
    setattr(getattr(arguments, call), field, value)
    assert arguments.call("attend" if call == "history" else call) == (status, blamed)


def test_an_output_that_is_not_aligned():
    arguments = Arguments()
    arguments.pack.out += 32
    assert arguments.call("pack") == (VALUE, "out")


@pytest.mark.parametrize(
    ("call", "view"),
    [("salience", "q"), ("pack", "k"), ("pack", "v"), ("unpack", "k"), ("append", "v_new"), ("attend", "out")],
)
@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda view: setattr(view, "dtype", 4), DTYPE),
        (lambda view: setattr(view, "data", None), NULL),
        (lambda view: view.shape.__setitem__(1, -1), SHAPE),
        (lambda view: view.shape.__setitem__(3, 12), SHAPE),
    ],
)
def test_one_wrong_array(call, view, change, status):
    arguments = Arguments()
    change(getattr(getattr(arguments, call), view))
    assert arguments.call(call)[0] == status


def test_records_that_are_not_there():
    assert c_api.inspect(None, 64) == (NULL, "record")
    assert c_api.inspect(bytes(64), info=False) == (NULL, "record")
    assert c_api.inspect(bytes(64), 63) == (SPACE, "record")


def test_an_error_need_not_be_taken():
    assert c_api.table().salience(None, None) == NULL


def test_a_workspace_for_sizes_that_do_not_fit():
    from ctypes import byref

    arguments = Arguments()
    arguments.history.kv_heads = 0
    assert c_api.table().attend_workspace(byref(arguments.attend)) == 0
