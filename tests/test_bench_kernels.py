"""`mixkvq bench kernels`: data, checks, bars, and the command from end to end."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from mixkvq import MixKVQConfig, ops, reference
from mixkvq.bench import kernels, plain, systems
from mixkvq.bench.bars import Bar, break_even, kernel_sheet, per_head
from mixkvq.bench.check import WrongResult, check, exact_attention, relative_error
from mixkvq.bench.history import Records
from mixkvq.bench.machine import copies_to_pass, last_level_cache, read_rate, resident
from mixkvq.bench.rows import Log, Row, read
from mixkvq.bench.samples import Sampler, repeated
from mixkvq.bench.sheets import Sheet, context, number, spread
from mixkvq.cli import main
from mixkvq.cli.info import usable_cpus
from mixkvq.eval.stats import Interval
from mixkvq.store import PackedStore

CACHE = 400_000
"""Bytes, in the place of a real last-level cache, so that few copies leave it."""


# ---- data ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["compact", "default", "kivi-2", "lossless"])
@pytest.mark.parametrize("tokens", [100, 131, 132, 700])
def test_a_history_is_what_the_cache_would_hold(preset: str, tokens: int) -> None:
    """As many blocks, as long a window and as many bytes as a store after as many tokens; blocks come round again."""
    config, sampler = MixKVQConfig.preset(preset), Sampler(16, heads=2)
    records = Records.pack(config, sampler, blocks=2)
    history = records.history(tokens)
    k, v = sampler.states(tokens)
    store = PackedStore.begin(config, config.codec(16, "float32"), k, v, torch.zeros(1, dtype=torch.int64))
    held = history.layer.tensors
    assert held.blocks.tolist() == store.blocks.tolist() and held.exact.tolist() == store.exact.tolist()
    window = 2 * 2 * int(store.exact[0]) * 16 * 4
    if preset not in ("kivi-2", "lossless"):  # one record size
        assert history.nbytes == store.totals().record_bytes + window
    decoded, _ = history.decoded()
    sinks, blocks = min(config.sink_length, tokens), int(held.blocks[0])
    behind = decoded[:, :, sinks:]
    for j in range(2, blocks):
        assert torch.equal(behind[:, :, 128 * j : 128 * (j + 1)], behind[:, :, 128 * (j % 2) : 128 * (j % 2 + 1)])
    if preset == "lossless" and blocks:
        assert torch.equal(behind[:, :, : 128 * min(blocks, 2)], sampler.states(256)[0][:, :, : 128 * min(blocks, 2)])


def test_decoded_is_what_the_reference_decodes() -> None:
    records = Records.pack(MixKVQConfig.preset("compact"), Sampler(32, heads=1), blocks=2)
    size = int(records.sizes[0, 0, 1])
    assert records.mu is not None
    raw = records.staging[0, 0, 1, :size].numpy().tobytes()
    want_k, want_v = reference.unpack(raw, records.mu[0, 0].numpy())
    k, v = records.history(4 + 256 + 100).decoded()
    np.testing.assert_array_equal(k[0, 0, 4 + 128 : 4 + 256].numpy(), want_k)
    np.testing.assert_allclose(v[0, 0, 4 + 128 : 4 + 256].numpy(), want_v, rtol=1e-5, atol=1e-6)


def test_samples_are_reproducible_and_unequal() -> None:
    k, _ = Sampler(32).states(300)
    assert k.shape == (1, 8, 300, 32) and torch.equal(k, Sampler(32).states(300)[0])
    assert not torch.equal(k, Sampler(32, seed=2).states(300)[0])
    widths = k.std(2)
    assert float(widths.max() / widths.min()) > 5
    q = Sampler(32).queries(4, tokens=4000)
    found = q.view(8, 4, 4000, 32).square().mean((1, 2)).sqrt()
    assert torch.allclose(found, Sampler(32).importance()[0], rtol=0.05)


def test_repeated_states() -> None:
    x = torch.arange(3.0).view(1, 1, 3, 1)
    assert repeated(x, 7).flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_copies_pass_five_caches_within_memory() -> None:
    assert copies_to_pass(10, cache=100, memory=10_000) == 50
    assert copies_to_pass(600, cache=100, memory=10_000) == 1
    assert copies_to_pass(10, cache=100, memory=200) == 20
    assert copies_to_pass(10, cache=0, memory=5) == 1
    assert resident(499, 100) and not resident(500, 100)


def test_copies_are_read_in_turn() -> None:
    data = systems.Data(["a", "b", "c"], 10, cache=6)
    assert [data.next() for _ in range(4)] == ["a", "b", "c", "a"]
    assert data.facts == {"nbytes": 10, "copies": 3, "resident": False}
    assert systems.Data(["a"], 10, cache=6).facts["resident"]


def test_the_machine_has_a_cache_and_reads() -> None:
    threads = torch.get_num_threads()
    assert last_level_cache() >= 0
    assert 1e8 < read_rate(1, nbytes=1 << 22) < 1e13
    assert torch.get_num_threads() == threads


# ---- checks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [1, 3])
def test_every_formulation_computes_attention(group: int) -> None:
    sampler = Sampler(16, heads=2)
    k, v = sampler.states(50)
    q = sampler.queries(group)
    scores = np.einsum("hgd,hnd->hgn", q.view(2, group, 16).double(), k[0].double()) / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    by_hand = np.einsum("hgn,hnd->hgd", weights / weights.sum(-1, keepdims=True), v[0].double())
    want = exact_attention(q, k, v)
    np.testing.assert_allclose(want.view(2, group, 16), by_hand, rtol=1e-12, atol=1e-14)
    for name, function in plain.formulations(group).items():
        assert relative_error(function(q, k, v), want) < 1e-5, name
    got = ops.attend(plain.window(k, v), q, precision="exact").view_as(q)
    assert relative_error(got, want) < 1e-5


def test_the_error_is_that_of_the_worst_head() -> None:
    want = torch.ones(1, 2, 1, 4, dtype=torch.float64)
    got = want.clone()
    got[0, 1, 0, 0] = 1.2
    assert relative_error(got, want) == pytest.approx(0.1)
    assert check("a", got, want, 0.11) == pytest.approx(0.1)
    for wrong in (got, torch.full_like(want, torch.nan)):
        with pytest.raises(WrongResult, match="a: relative error"):
            check("a", wrong, want, 0.09)


def test_a_wrong_result_is_never_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ops.attend

    def shifted(layer: Any, q: Any, *, precision: str) -> Any:
        return real(layer, q, precision=precision) * (1 + 3e-5 * (precision == "exact"))

    monkeypatch.setattr(ops, "attend", shifted)
    monkeypatch.setattr(kernels, "last_level_cache", lambda: CACHE)
    log = Log(tmp_path / "rows.jsonl", {})
    with pytest.raises(WrongResult, match=r"compact, exact: relative error (3|2\.9).*must be at most 1e-05"):
        kernels.run(tiny(presets=("compact",)), log, lambda *event: None)
    assert log.rows == []


# ---- bars ----------------------------------------------------------------------------------------------------------
def test_verdicts() -> None:
    bar = Bar("rival", 4, 7)
    assert [bar.verdict(x) for x in (3.9, 4.0, 6.9, 7.0)] == [
        "misses floor",
        "meets floor",
        "meets floor",
        "meets target",
    ]
    assert [bar.verdict(x, 0.75) for x in (2.9, 3.0, 5.25)] == ["misses floor", "meets floor", "meets target"]


def packed(preset: str, seconds: float, tokens: int = 4096, group: int = 1, **facts: Any) -> Row:
    where = {"head_dim": 128, "tokens": tokens, "group": group, "threads": 1}
    known = {"role": "packed", "preset": preset, "precision": "default", "heads": 8, **facts}
    return Row("kernels", where, preset, [seconds] * 8, known)


def torch_row(formulation: str, seconds: float, group: int = 1, dtype: str = "bf16") -> Row:
    where = {"head_dim": 128, "tokens": 4096, "group": group, "threads": 1}
    facts = {"role": "torch", "dtype": dtype, "formulation": formulation, "heads": 8}
    return Row("kernels", where, f"torch {dtype} {formulation}", [seconds] * 8, facts)


def test_bars_are_against_the_fastest_sdpa() -> None:
    rows = [
        packed("compact", 1.0, group=4),
        packed("default", 1.0, group=4),
        torch_row("sdpa enable_gqa", 14.0, group=4),
        torch_row("sdpa rows", 2.5, group=4),
        torch_row("matmul", 1.0, group=4),
    ]
    lines = [line[:1] + line[3:6] + line[7:] for line in map(list, kernel_sheet(rows).rows)]
    assert [line[6] for line in kernel_sheet(rows).rows] == ["2.50", "2.50", "14.0", "14.0"]
    two, many = "2.50 [2.50, 2.50]", "14.0 [14.0, 14.0]"
    assert lines == [
        ["compact", "best torch bf16 SDPA", "bf16 sdpa rows", two, "2.00", "4.00", "meets floor"],
        ["default", "best torch bf16 SDPA", "bf16 sdpa rows", two, "1.50", "3.00", "meets floor"],
        ["compact", "torch bf16 sdpa enable_gqa", "bf16 sdpa enable_gqa", many, "14.0", "30.0", "meets floor"],
        ["default", "torch bf16 sdpa enable_gqa", "bf16 sdpa enable_gqa", many, "10.5", "22.5", "meets floor"],
    ]


def test_microseconds_per_thousand_tokens_and_head() -> None:
    assert per_head(packed("compact", 0.0), 320e-6) == pytest.approx(10)


def test_break_even_needs_every_longer_length_too() -> None:
    def at(*ratios: float) -> str:
        lengths = (256, 1024, 4096)
        return break_even([(n, Interval(r, 0.9 * r, 1.1 * r)) for n, r in zip(lengths, ratios, strict=True)])

    assert at(2, 2, 2) == "256 or less"
    assert at(0.5, 2, 2) == "1k"
    assert at(2, 1.05, 2) == "4k"  # the interval of 1.05 contains 1
    assert at(2, 2, 1) == "not up to 4k"


def test_numbers_for_people() -> None:
    assert [number(x) for x in (0.0456, 1.2345, 45.67, 456.7, 45678.9, float("nan"))] == [
        "0.05",
        "1.23",
        "45.7",
        "457",
        "45,679",
        "-",
    ]
    assert spread(Interval(2.0, 1.5, 2.5)) == "2.00 [1.50, 2.50]"
    assert spread(Interval(2.0, float("nan"), float("nan"))) == "2.00"
    assert [context(x) for x in (256, 1024, 131072, 1100)] == ["256", "1k", "128k", "1100"]
    sheet = Sheet("Title", ("name", "value"), [["a", "1"]])
    assert sheet.markdown() == "**Title**\n\n| name | value |\n|---|---:|\n| a | 1 |"


# ---- the command ---------------------------------------------------------------------------------------------------
def tiny(**fields: Any) -> kernels.Grid:
    small = {"head_dims": (16,), "tokens": (300,), "groups": (2,), "threads": (1,), "heads": 1, "seconds": 0.01}
    return kernels.Grid(**{**small, **fields})


def test_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernels, "last_level_cache", lambda: CACHE)
    monkeypatch.setattr("mixkvq.bench.machine.read_rate", lambda threads, clock: 4e10)
    before = torch.get_num_threads()
    args = ["--presets", "compact,default", "--head-dims", "16", "--tokens", "300,1024", "--groups", "2"]
    args += ["--threads", "1", "--heads", "2", "--seconds", "0.05", "--out", str(tmp_path)]
    assert main(["bench", "kernels", *args]) == 0
    assert torch.get_num_threads() == before
    shown = capfd.readouterr().out
    for words in ("compact, default", "torch bf16 sdpa enable_gqa", "Faster from how many tokens on", "Read rate"):
        assert words in shown

    machine, rows = read(tmp_path / "kernels.jsonl")
    assert machine["read rate"].keys() == {"1"} and machine["isa chosen"]
    assert len(rows) == 2 * (2 * 2 * 2 + 2 * 4)  # lengths; packed, also in cache; core and three formulations
    for row in rows:
        assert 8 <= len(row.taken) <= 64 and 0 < row.best <= row.median < 1
        plain_bytes = 2 * 2 * row.where["tokens"] * 16 * (2 if row.facts.get("dtype") == "bf16" else 4)
        if row.facts["role"] == "packed":
            assert row.facts["nbytes"] < plain_bytes
            assert row.facts["error"] < 2e-3
        else:
            assert row.facts["nbytes"] == plain_bytes
        assert row.facts["copies"] * row.facts["nbytes"] >= 5 * CACHE
        assert row.facts["resident"] is bool(row.facts.get("in_cache", False))
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")

    assert main(["bench", "show", str(tmp_path / "kernels.jsonl"), "--markdown"]) == 0
    assert "| head_dim | group | threads | tokens | system |" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--groups", "1,x"], "--groups is '1,x', must be numbers from 1 on"),
        (["--head-dims", "4"], "--head-dims is '4', must be numbers from 8 on"),
        (["--presets", "compakt"], "--presets is 'compakt', must be of default, compact"),
        (["--precisions", ""], "--precisions is '', must be of exact, default"),
        (["--threads", "100000"], "--threads is '100000', must be at most"),
        (["--threads", "2,1", "--cpu-time"], "must be 1 with --cpu-time" if usable_cpus() > 1 else "must be at most 1"),
        (["--heads", "0"], "--heads is 0, must be at least 1"),
    ],
)
def test_wrong_options(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *args]) == 1
    assert message in capfd.readouterr().err


def test_show_of_another_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"machine": {}}) + "\n")
    assert main(["bench", "show", str(file)]) == 1
    assert "holds no rows of" in capfd.readouterr().err
