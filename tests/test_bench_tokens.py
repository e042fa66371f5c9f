"""`mixkvq bench tokens`: which steps pack, what is promised, and the command on a tiny model."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from eval_fixtures import byte_model, save_byte_model

from mixkvq import MixKVQCache
from mixkvq.bench import token_tables, tokens
from mixkvq.bench.decoder import Decoder, packed_blocks
from mixkvq.bench.rows import Row, read
from mixkvq.cli import main
from mixkvq.errors import UserError
from mixkvq.eval.schemes import parse_schemes


def test_a_decoder_knows_which_steps_packed() -> None:
    """Two layers of two heads; a block is packed whenever the window behind the sinks holds 128 tokens."""
    model, _ = byte_model()
    cache = MixKVQCache("default", config=model.config)
    decoder = Decoder(model, cache, torch.arange(300).view(1, -1) % 90)
    decoder.read(257)  # 4 sinks, a block, 125 tokens
    assert packed_blocks(cache) == 2 and decoder.position == 257
    for _ in range(6):
        decoder.count()
        decoder.step()
    decoder.count()
    assert decoder.blocks == [2, 2, 2, 4, 4, 4, 4] and decoder.flushed() == [2]
    assert decoder.position == cache.get_seq_length() == 263


def test_prompts_leave_room_for_the_steps() -> None:
    plan = tokens.Plan(parse_schemes("default,exact"), tokens=(64, 8192), steps=64)
    assert tokens.prompts(plan, None) == [64, 8192]
    assert tokens.prompts(plan, 8192) == [64, 8192 - 66]
    with pytest.raises(UserError, match="--tokens is 8192, must be at most 4096"):
        tokens.prompts(plan, 4096)


def row(phase: str, system: str, seconds: list[float], length: int = 4096, **facts: Any) -> Row:
    kind = "exact" if system == "exact" else "packed"
    return Row(
        "tokens", {"tokens": length, "threads": 2, "phase": phase}, system, list(seconds), {"kind": kind, **facts}
    )


def test_a_packing_step_against_the_others() -> None:
    seconds = [1.0] * 9 + [3.0] + [1.0] * 9 + [5.0] + [4.0]
    ratio, packing, usual = token_tables.flush_ratio(row("flush", "default", seconds, flushed=[9, 19, 20]))
    assert (ratio.value, ratio.low, ratio.high) == (4.0, 3.0, 5.0)
    assert packing == [3.0, 5.0, 4.0] and usual == 1.0


def test_bars() -> None:
    rows = [
        row("decode", "default", [2.0] * 8),
        row("decode", "exact", [3.0] * 8),
        row("decode", "default", [1.1] * 8, 64),
        row("decode", "exact", [1.0] * 8, 64),
        row("prefill", "default", [1.1] * 3, 64),
        row("prefill", "exact", [1.0] * 3, 64),
        row("prefill", "default", [1.2]),
        row("prefill", "exact", [1.0]),
        row("flush", "default", [1.0, 1.9, 1.0], flushed=[1]),
        row("flush", "default", [1.0, 2.1, 1.0], 1024, flushed=[1]),
    ]
    assert [(line[1], line[2], line[4]) for line in token_tables.bars(rows).rows] == [
        ("1.50 [1.50, 1.50]", "1.30", "meets floor"),
        ("0.91 [0.91, 0.91]", "0.95", "misses floor"),
        ("1.10 [1.10, 1.10]", "1.15", "meets floor"),
        ("1.20", "1.15", "misses floor"),
        ("1.90", "2.00", "meets floor"),
        ("2.10", "2.00", "misses floor"),
    ]


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mixkvq.bench.machine.read_rate", lambda threads, clock: 4e10)
    model = str(save_byte_model(tmp_path / "model"))
    args = ["--model", model, "--tokens", "64,256", "--steps", "8", "--flush-tokens", "256", "--flushes", "2"]
    assert main(["bench", "tokens", *args, "--threads", "1", "--out", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    for words in ("Reading the prompt", "Decoding, one token at a time", "Steps that pack a block in every layer"):
        assert words in shown
    _, rows = read(tmp_path / "tokens.jsonl")
    assert [(r.where["tokens"], r.where["phase"], r.system) for r in rows] == [
        *((64, phase, name) for phase in ("prefill", "decode") for name in ("default", "exact")),
        *((256, phase, name) for phase in ("prefill", "decode") for name in ("default", "exact")),
        (256, "flush", "default"),
    ]
    for each in rows:
        assert len(each.taken) == {"prefill": 5, "decode": 8}.get(each.where["phase"], len(each.taken))
    # 260 tokens leave 128 behind 4 sinks and a block: two untimed steps, then the second timed one
    decoded = next(r for r in rows if r.where == {"tokens": 256, "threads": 1, "phase": "decode"})
    assert decoded.facts["flushed"] == [1]
    flush = rows[-1].facts["flushed"]
    assert len(flush) == 2 and flush[1] - flush[0] == 128 and len(rows[-1].taken) == flush[1] + 1
    assert flush[0] == 388 - (256 + 2 + 8) - 1
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--steps", "0"], "--steps is 0, must be at least 1"),
        (["--flushes", "-1"], "--flushes is -1, must be at least 0"),
        (["--schemes", "int4-token"], "'int4-token' is simulated"),
        (["--tokens", "0"], "--tokens is '0', must be numbers from 1 on"),
    ],
)
def test_wrong_options(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tokens", *args]) == 1
    assert message in capfd.readouterr().err
