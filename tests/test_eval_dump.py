"""Files of queries, keys and values: what was written comes back, and what was not is refused."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from cli_fixtures import save_tiny_model
from models import VOCABULARY, tiny
from safetensors.torch import load_file, save_file

from mixkvq.cli import main
from mixkvq.errors import UserError
from mixkvq.eval.dump import Dump, observe, parse_layers, write_dump
from mixkvq.eval.texts import Window
from mixkvq.fingerprint import fingerprint

WINDOW = Window("noise", 2, tuple(np.random.default_rng(0).integers(2, VOCABULARY, 90).tolist()))


def ignore(*_: Any) -> None:
    pass


def written(path: Path, model: Any, layers: list[int] | None = None, dtype: str = "float32") -> list[Any]:
    found = observe(model, WINDOW, layers, ignore)
    write_dump(path, model, WINDOW, found, dtype, ignore)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written(tmp_path / "qkv.safetensors", tiny())
    return tmp_path / "qkv.safetensors"


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager"), ("qwen2", "sdpa")]
)
def test_round_trip(family: str, attention: str, tmp_path: Path) -> None:
    model, path = tiny(family, attention), tmp_path / "deep" / "qkv.safetensors"
    layers = written(path, model)
    dump = Dump.open(path)
    assert dump.layers == [0, 1] and dump.tokens == 90
    for layer in layers:
        back = dump.read(layer.layer)
        for name in ("query", "key", "value"):
            assert torch.equal(getattr(back, name), getattr(layer, name))
        assert (back.scaling, back.softcap, back.window) == (layer.scaling, layer.softcap, layer.window)
        assert (back.sinks is None) == (layer.sinks is None) == (family != "gpt_oss")
        assert back.sinks is None or torch.equal(back.sinks, layer.sinks)
    about = {name: dump.about[name] for name in ("fingerprint", "domain", "window", "digest", "dtype")}
    assert about == {
        "fingerprint": fingerprint(model.config),
        "domain": "noise",
        "window": 2,
        "digest": WINDOW.digest,
        "dtype": "float32",
    }
    assert fingerprint(dump.model.config) == fingerprint(model.config)
    assert [p.name for p in path.parent.iterdir()] == ["qkv.safetensors"]


def test_half_precision_and_chosen_layers(tmp_path: Path) -> None:
    path, told = tmp_path / "half.safetensors", list[str]()
    layers = observe(tiny(), WINDOW, [1], ignore)
    write_dump(path, tiny(), WINDOW, layers, "float16", told.append)
    dump = Dump.open(path)
    size = 90 * 16 * (4 + 2 + 2) * 2
    assert dump.layers == [1] and told == [f"1 layers of 90 tokens in float16: {size / 1e6:,.1f} MB into {path}"]
    assert size < path.stat().st_size < size + 4096
    assert torch.equal(dump.read(1).key, layers[0].key.half().float())


def test_other_content_other_digest(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    written(again, tiny())
    assert Dump.open(again).digest == Dump.open(file).digest
    written(again, tiny(seed=1))
    assert Dump.open(again).digest != Dump.open(file).digest


def test_numbers_beyond_float16_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    layers = observe(tiny(), WINDOW, None, ignore)
    key = layers[1].key.clone()
    key[0, 3, 2] = 1e5
    layers[1] = replace(layers[1], key=key)
    with pytest.raises(UserError, match="--dump-dtype is float16, which cannot hold the key of layer 1"):
        write_dump(tmp_path / "x", tiny(), WINDOW, layers, "float16", ignore)
    with pytest.raises(UserError, match="--dump-dtype is 'int8', must be one of float32, float16"):
        write_dump(tmp_path / "x", tiny(), WINDOW, layers, "int8", ignore)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_dump(tmp_path / "file" / "x", tiny(), WINDOW, layers, "float32", ignore)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unwritten_file_does_not_replace_the_old_one(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        written(file, tiny(seed=1))
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def test_layers_that_cannot_be_dumped() -> None:
    with pytest.raises(UserError, match=r"--layers names \[2\], must be among the attention layers \[0, 1\]"):
        observe(tiny(), WINDOW, [1, 2], ignore)
    with pytest.raises(UserError, match=r"--model: .*cannot be observed"):
        observe(tiny("bloom", "eager"), WINDOW, None, ignore)


@pytest.mark.parametrize(
    ("text", "layers"), [("all", None), ("3", [3]), ("0,4,8-11", [0, 4, 8, 9, 10, 11]), ("2,1-2", [1, 2])]
)
def test_layer_lists(text: str, layers: list[int] | None) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1.5"])
def test_wrong_layer_lists(text: str) -> None:
    with pytest.raises(UserError, match="--layers is"):
        parse_layers(text)


# ---- files from anywhere -------------------------------------------------------------------------------------------
def test_every_cut_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for cut in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="is no complete safetensors file"):
            Dump.open(file)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(UserError, match="cannot be read"):
        Dump.open(path)
    with pytest.raises(UserError, match="cannot be read"):
        Dump.open(tmp_path)
    path.write_text("a letter to a friend, longer than a header")
    with pytest.raises(UserError, match="no complete safetensors file"):
        Dump.open(path)
    for metadata in (None, {"format": "pt"}, {"mixkvq": "{"}, {"mixkvq": "[]"}):
        save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(UserError, match="was not written by `mixkvq eval dump`"):
            Dump.open(path)


def change(file: Path, edit: Any) -> None:
    """Apply `edit` (tensors, metadata) to a file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        about = json.loads(tensors.metadata()["mixkvq"])
    parts = load_file(file)
    edit(parts, about)
    save_file(parts, file, {"mixkvq": json.dumps(about)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, a: a.update(version=2), "has version 2, must be 1: dump it again"),
        (lambda t, a: a.pop("tokens"), "'tokens' is missing"),
        (lambda t, a: a.update(tokens=91), "layer 0 has 4 query heads, 2 KV heads, 90 tokens"),
        (lambda t, a: a.update(model=None), "model is no text"),
        (lambda t, a: a.update(layers={}), "layers .. are not among the model's 2"),
        (lambda t, a: a.update(layers=3), "is no valid dump"),
        (lambda t, a: a["layers"].update({"x": {}}), "is no valid dump"),
        (lambda t, a: a["layers"].update({"2": a["layers"]["1"]}), "'layers.2.query' is missing"),
        (lambda t, a: a["layers"]["1"].pop("window"), "layer 1 must have scaling, softcap and window"),
        (lambda t, a: a["layers"]["1"].update(scaling=None), "scaling of layer 1 is None"),
        (lambda t, a: a["layers"]["1"].update(scaling=-1.0), "scaling of layer 1 is -1.0"),
        (lambda t, a: a["layers"]["1"].update(window=2.5), "window of layer 1 is 2.5"),
        (lambda t, a: a["layers"]["1"].update(softcap="x"), "softcap of layer 1 is 'x'"),
        (lambda t, a: a["config"].update(model_type="unheard-of"), "does not know models of type 'unheard-of'"),
        (lambda t, a: a["config"].update(num_hidden_layers=1), "are not among the model's 1"),
        (lambda t, a: a.update(config=None), "is no valid dump"),
        (lambda t, a: t.pop("layers.1.value"), "'layers.1.value' is missing"),
        (lambda t, a: t.update({"layers.1.value": torch.zeros(2, 89, 16)}), "of layer 1 do not fit together"),
        (lambda t, a: t.update({"layers.1.query": torch.zeros(3, 90, 16)}), "layer 1 has 3 query heads, 2 KV heads"),
        (lambda t, a: t.update({"layers.1.query": torch.zeros(90, 16)}), "is no valid dump"),
        (lambda t, a: t.update({"layers.1.query": torch.zeros(4, 90, 16).half()}), "do not fit together"),
        (lambda t, a: t.update({f"layers.0.{n}": t[f"layers.0.{n}"].int() for n in QKV}), "of dtype I32, must be F32"),
        (lambda t, a: t.update({"layers.0.sinks": torch.zeros(5)}), "sinks of layer 0 must be 4 numbers"),
    ],
)
def test_what_does_not_fit_is_named(edit: Any, message: str, file: Path) -> None:
    change(file, edit)
    with pytest.raises(UserError, match=message):
        Dump.open(file)


QKV = ("query", "key", "value")


@pytest.mark.parametrize("name", QKV)
def test_numbers_that_are_not_finite_are_named(name: str, file: Path) -> None:
    def spoil(tensors: Any, about: Any) -> None:
        tensors[f"layers.1.{name}"][1, 5, 2] = torch.nan

    change(file, spoil)
    dump = Dump.open(file)
    dump.read(0)
    with pytest.raises(UserError, match=f"{name} of layer 1 holds numbers that are not finite"):
        dump.read(1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, path = save_tiny_model(tmp_path / "tiny"), tmp_path / "qkv.safetensors"
    args = ["eval", "dump", str(path), "--model", str(folder), "--context", "60", "--layers", "1"]
    assert main([*args, "--dump-dtype", "float16"]) == 0
    told = capsys.readouterr().out
    assert "1 layers of 60 tokens in float16" in told and "Written: " in told
    dump = Dump.open(path)
    assert dump.layers == [1] and dump.about["domain"] == "prose" and dump.about["model"] == "tiny"
    for wrong, message in (
        (["--dump-dtype", "int8"], "--dump-dtype is 'int8'"),
        (["--context", "1"], "--context is 1"),
        (["--layers", "7"], "--layers names"),
        (["--layers", "x"], "--layers is 'x'"),
    ):
        assert main([*args, *wrong]) == 1
        assert message in capsys.readouterr().err
