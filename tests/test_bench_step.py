"""`mixkvq bench step`: caches filled without the model, ratios beyond the empty step, and the command."""

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

from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.bench import step, step_tables
from mixkvq.bench.machine import Evictor
from mixkvq.bench.rows import Row, read, times_faster_beyond
from mixkvq.bench.tiny import fill, states_of, tiny_llama
from mixkvq.cli import main
from mixkvq.compat import cache_argument
from mixkvq.errors import UserError
from mixkvq.eval.stats import excess_ratio_interval


def logits_of(model: Any, cache: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([[7]]), **cache_argument(cache)).logits[0, 0]


def test_a_filled_cache_is_packed_and_attends_to_what_it_was_filled_with() -> None:
    model, states = tiny_llama(16, 2, 2, 2, "sdpa"), states_of(16, 2, 2, 300)
    exact = DynamicCache(config=model.config)
    fill(exact, model, states)
    want = logits_of(model, exact)
    empty = DynamicCache(config=model.config)
    fill(empty, model, [(k[:, :, :1], v[:, :, :1]) for k, v in states])
    scale = (logits_of(model, empty) - want).norm()  # what the history does to the logits
    lossless = MixKVQCache("lossless", config=model.config)
    fill(lossless, model, states)
    report = lossless.report()
    assert [layer.path for layer in report.layers] == ["packed"] * 2 and report.true_bits >= 32
    assert (logits_of(model, lossless) - want).norm() < 1e-4 * scale
    coded = MixKVQCache("default", config=model.config)
    fill(coded, model, states)
    assert coded.get_seq_length() == exact.get_seq_length() - 1 == 300
    assert 1e-4 * scale < (logits_of(model, coded) - want).norm() < 0.5 * scale


def test_states_repeat_in_memory_of_their_own() -> None:
    (k, _), (other, _) = states_of(8, 1, 2, 5000)
    assert k.shape == (1, 1, 5000, 8) and k.is_contiguous()
    assert torch.equal(k[:, :, :100], k[:, :, 2048:2148]) and not torch.equal(k, other)


def test_a_model_is_the_same_every_time_and_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = tiny_llama(8, 1, 2, 1, "sdpa"), tiny_llama(8, 1, 2, 1, "eager")
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert tiny_llama(8, 3, 3, 1, "sdpa").config.hidden_size == 135


def test_an_evictor_reads_five_caches() -> None:
    evict = Evictor(1000)
    evict()
    assert evict._block.nbytes == 5000


# ---- ratios --------------------------------------------------------------------------------------------------------
def row(system: str, seconds: list[float | None], kind: str = "packed", **where: Any) -> Row:
    place = {"head_dim": 128, "tokens": 4096, "group": 4, "threads": 1, "part": "step", **where}
    return Row("step", place, system, seconds, {"kind": kind, "nbytes": 1000, "layers": 2})


def test_what_the_model_costs_is_taken_off() -> None:
    base = row(step.EMPTY, [2.0, 2.0, 2.0, 9.0], "empty")
    ours, rival = row("compact", [3.0, 3.0, 3.0, 3.0]), row("exact", [8.0, 8.0, None, 8.0], "exact")
    found = times_faster_beyond(ours, rival, base)
    assert found.value == 6.0  # (8 - 2) / (3 - 2)


def test_the_interval_of_an_excess_covers_the_truth() -> None:
    import numpy as np

    r, inside = np.random.default_rng(0), 0
    for _ in range(100):
        base = r.normal(10, 0.2, 40)
        found = excess_ratio_interval(r.normal(22, 0.3, 40), r.normal(14, 0.2, 40), base)
        inside += found.low <= 3.0 <= found.high
    assert inside >= 88  # 95 expected; 3.2 standard errors below


def test_bars_take_the_faster_dynamic_cache() -> None:
    rows = [
        row("compact", [3.0] * 8, part=step.ATTENTION),
        row("exact", [14.0] * 8, "exact", part=step.ATTENTION),
        row(step.EAGER, [17.0] * 8, "exact", part=step.ATTENTION),
        row("hqq-2", [34.0] * 8, "transformers", part=step.ATTENTION),
    ]
    lines = [[line[i] for i in (0, 1, 2, 4, 5, 6, 7)] for line in step_tables.bars(rows).rows]
    assert lines == [
        ["compact", "exact", "update + attention", "4.67", "6.00", "15.0", "misses floor"],
        ["compact", "hqq-2", "update + attention", "11.3", "10.0", "25.0", "meets floor"],
    ]
    assert step_tables.bars([row("compact", [1.0])]).rows == []  # a whole step has other costs, too


def test_a_replay_is_the_attention_of_a_step() -> None:
    """Its output is that of attention over the history and the new token, for any cache."""
    model, states = tiny_llama(16, 2, 2, 2, "sdpa"), states_of(16, 2, 2, 300)
    replay, outputs = step.Replay(model, states), {}
    for name in ("exact", "lossless"):
        cache = DynamicCache(config=model.config) if name == "exact" else MixKVQCache(name, config=model.config)
        fill(cache, model, states)
        outputs[name] = replay(cache)
        assert cache.get_seq_length() == 301
    assert outputs["exact"].shape == (1, 1, 4, 16)
    assert torch.allclose(outputs["exact"], outputs["lossless"], atol=1e-5)


# ---- the command ---------------------------------------------------------------------------------------------------
def test_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(step, "last_level_cache", lambda: 100_000)
    monkeypatch.setattr("mixkvq.bench.machine.read_rate", lambda threads, clock: 4e10)
    args = ["--schemes", "compact,exact,exact-eager", "--head-dims", "16", "--groups", "2", "--tokens", "200,300"]
    args += ["--slow-tokens", "200", "--cpu-time", "--heads", "2", "--seconds", "0.05", "--out", str(tmp_path)]
    assert main(["bench", "step", *args]) == 0
    shown = capfd.readouterr().out
    assert "One decode step, 2 layers" in shown and "Times faster than" in shown
    machine, rows = read(tmp_path / "step.jsonl")
    assert machine["clock"] == "cpu" and "Times are of the computing thread." in shown
    assert [(r.where["tokens"], r.where["part"], r.system) for r in rows] == [
        (tokens, part, name)
        for tokens, names in ((200, ("compact", "exact", "exact-eager")), (300, ("compact", "exact")))
        for part in step.PARTS
        for name in (*names, "empty history")
    ]
    by_name = {(r.where["tokens"], r.system): r for r in rows if r.where["part"] == step.STEP}
    assert by_name[300, "exact"].facts["nbytes"] == 2 * 2 * 2 * 300 * 16 * 4
    assert by_name[300, "compact"].facts["nbytes"] < by_name[300, "exact"].facts["nbytes"]
    assert by_name[300, "compact"].facts["paths"] == ["packed"]
    assert all(8 <= len(r.taken) <= 64 and r.best > 0 for r in rows)
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_schemes() -> None:
    said: list[str] = []
    assert [s.name for s in step.parse(["default", step.EAGER], skip=False, say=said.append)] == ["default", step.EAGER]
    with pytest.raises(UserError, match="unknown"):
        step.parse(["defaults"], skip=True, say=said.append)
    with pytest.raises(UserError, match="'int4-token' is simulated: its speed says nothing"):
        step.parse(["int4-token"], skip=False, say=said.append)
    assert said == []


def test_back_ends_that_are_not_installed_are_left_out_of_the_usual_ones_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("mixkvq.eval.rivals.version", missing)
    said: list[str] = []
    assert [s.name for s in step.parse(step.SCHEMES, skip=True, say=said.append)] == [
        "compact",
        "default",
        "exact",
        step.EAGER,
    ]
    assert len(said) == 2 and "scheme hqq-2 needs the package hqq" in said[0]
    with pytest.raises(UserError, match="needs the package hqq"):
        step.parse(["hqq-2"], skip=False, say=said.append)
