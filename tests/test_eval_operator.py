"""``mixkvq eval operator`` and ``mixkvq eval layers``, from a tiny model to tables and figure."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("safetensors")

from cli_fixtures import save_tiny_model
from models import VOCABULARY, tiny

from mixkvq.cli import main
from mixkvq.errors import UserError
from mixkvq.eval import layers as layer_eval
from mixkvq.eval import models, operator
from mixkvq.eval.attention import LayerStates
from mixkvq.eval.dump import Dump, observe, write_dump
from mixkvq.eval.layers import Plan, maps, pooled, stack, statistics
from mixkvq.eval.results import Results
from mixkvq.eval.schemes import parse_schemes
from mixkvq.eval.texts import Window

SINK, PROMPT = 4, 4 + 2 * 64
FIELDS = {"sink_length": SINK, "block_length": 64, "residual_length": 64}
WINDOW = Window("noise", 0, tuple(np.random.default_rng(0).integers(2, VOCABULARY, 300).tolist()))


def ignore(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Dump:
    path, model = tmp_path_factory.mktemp("dump") / "qkv.safetensors", tiny(head_dim=64)
    write_dump(path, model, WINDOW, observe(model, WINDOW, None, ignore), "float32", ignore)
    return Dump.open(path)


def scored(dump: Dump, names: str, tmp_path: Path, baseline: int | None = 0) -> list[operator.Row]:
    schemes, results = parse_schemes(names, FIELDS), Results(tmp_path / "results.jsonl")
    operator.measure(dump, schemes, PROMPT, SINK, results, ignore)
    base = None if baseline is None else schemes[baseline]
    return operator.summarize(dump, schemes, PROMPT, SINK, results, base)


def test_schemes_side_by_side(dump: Dump, tmp_path: Path) -> None:
    names = "default,simulated/default,lossless,exact,kivi-2,compact:key_group_size=64"
    ours, same, lossless, exact, kivi, compact = scored(dump, names, tmp_path)
    assert ours.layers == 2 and ours.paths == {"packed": 2} and same.paths == {"simulated": 2}
    for name in ("true_bits", "logits", "output", "kl", "ratio"):
        assert getattr(ours, name) == getattr(same, name), name
    assert ours.ratio is not None and (ours.ratio.value, ours.ratio.low, ours.ratio.high) == (1, 1, 1)
    for row in (lossless, exact):
        assert row.logits.value < 1e-7 and row.output.value < 1e-6 and row.kl.value < 1e-12
    assert exact.true_bits is None and lossless.true_bits is not None and lossless.true_bits > 32
    for row in (kivi, compact):
        assert row.logits.value > 1.2 * ours.logits.value and row.output.value > 1.2 * ours.output.value
        assert row.kl.low > ours.kl.high and row.ratio is not None and row.ratio.low > 1.2
    for row in (ours, kivi):
        for x in (row.logits, row.output, row.kl):
            assert 0 < x.low < x.value < x.high


def test_bits_are_those_of_the_cache(dump: Dump, tmp_path: Path) -> None:
    from mixkvq.eval.replay import Prefill

    (row,) = scored(dump, "compact:key_group_size=64", tmp_path)
    cache = row.scheme.cache(tiny(head_dim=64))
    Prefill.record(tiny(head_dim=64), torch.tensor([WINDOW.ids[:PROMPT]])).replay(cache)
    assert row.true_bits == cache.report().true_bits


def test_second_run_measures_nothing(dump: Dump, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scored(dump, "default,magnitude", tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    assert len(before.splitlines()) == 4  # two layers, two schemes

    def forbidden(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(operator, "through_cache", forbidden)
    monkeypatch.setattr(Dump, "read", forbidden)
    assert [(r.kl, r.ratio) for r in scored(dump, "default,magnitude", tmp_path)] == [(r.kl, r.ratio) for r in first]
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_one_layer_and_none_measured(dump: Dump, tmp_path: Path) -> None:
    schemes, results = parse_schemes("default", FIELDS), Results(tmp_path / "results.jsonl")
    operator.measure(dump, schemes, PROMPT, SINK, results, ignore)
    both = operator.summarize(dump, schemes, PROMPT, SINK, results)[0]
    one, other = (operator.summarize(dump, schemes, PROMPT, SINK, results, layers=[i])[0] for i in (0, 1))
    assert both.kl.value == pytest.approx((one.kl.value + other.kl.value) / 2)
    assert both.logits.value**2 == pytest.approx((one.logits.value**2 + other.logits.value**2) / 2)
    assert one.layers == 1 and one.ratio is None
    with pytest.raises(ValueError, match="scheme default has not been measured"):
        operator.summarize(dump, schemes, PROMPT + 1, SINK, results)


@pytest.mark.parametrize("prompt", [4, 300, -1])
def test_prompt_must_leave_something(prompt: int) -> None:
    with pytest.raises(UserError, match=f"--prefill is {prompt}, must be from 5 to 299 .300 tokens."):
        operator.check_prompt(prompt, 300, SINK)


def test_operator_command_needs_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path, out = save_tiny_model(tmp_path / "tiny"), str(tmp_path / "qkv.safetensors"), tmp_path / "out"
    assert main(["eval", "dump", path, "--model", str(folder), "--context", "300"]) == 0
    capsys.readouterr()

    def forbidden(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(models, "load", forbidden)
    args = ["eval", "operator", path, "--prefill", "132", "--out", str(out), "--threads", "1"]
    assert main([*args, "--schemes", "default,int4-token,exact", "--per-layer", "--baseline", "kivi-2"]) == 0
    told = capsys.readouterr().out
    for part in ("KL / kivi-2", "int4-token (simulated)", "tiny, prose, layer 1: 168 queries", "2 layers: 168 queries"):
        assert part in told
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(np.asarray(row["values"]["kl"]).shape == (4, 3) for row in rows)
    assert main([*args, "--prefill", "300"]) == 1 and "--prefill is 300" in capsys.readouterr().err
    assert main(["eval", "operator", str(folder / "config.json"), "--out", str(out)]) == 1
    assert "no complete safetensors file" in capsys.readouterr().err


# ---- layers --------------------------------------------------------------------------------------------------------
def test_statistics_by_hand() -> None:
    """Two query heads per KV head; two blocks of keys behind a sink, the second one token long and left out."""
    n, prompt = 132, 130
    query, key = torch.zeros(4, n, 2), torch.zeros(2, n, 2)
    query[0, :, 0], query[1, :, 0], query[:, :, 1] = 3.0, 4.0, 2.0
    key[:, 1:65, 0], key[:, 65:129, 0] = 1.0, -0.5
    key[:, 1:65, 1], key[:, 65:129, 1] = 6.0, 0.0
    key[:, 0] = key[:, 129:] = 99.0
    found = statistics(LayerStates(0, query, key, key, 1.0), prompt, 1)
    assert found["importance"] == [[pytest.approx(12.5**0.5, rel=1e-6), 2.0], [0.0, 2.0]]
    assert found["spread"] == [[0.5, 2.0]] * 2
    a = np.log([12.5**0.5 * 0.5, 4.0])
    assert found["ln_a_sd"] == [pytest.approx(abs(a[0] - a[1]) / 2, rel=1e-6), 0.0]


def test_layers_of_a_model_with_windows(tmp_path: Path) -> None:
    """The windowed layer is native; keys bits, errors and maps of the other one."""
    model = tiny("gemma2", "eager")
    schemes, results = parse_schemes("default,int4-token", FIELDS), Results(tmp_path / "results.jsonl")
    plan = Plan(WINDOW, PROMPT, SINK)
    states = observe(model, WINDOW, None, ignore)
    layer_eval.measure(model, states, schemes, plan, results, ignore)
    first, second = layer_eval.summarize(model, [0, 1], schemes[0], plan, results)
    assert (first.path, first.true_bits, first.key_bits) == ("native", None, None)
    assert max(first.key, first.value, first.logits, first.output, first.kl) < 1e-6
    assert second.path == "packed" and second.key_bits == 3.0 and second.true_bits is not None
    assert 0 < second.key < 0.3 and 0 < second.logits < 0.3 and second.worst >= second.output > 0 and second.kl > 0
    found = maps(model, [0, 1], schemes, plan, results)
    assert found.importance.shape == found.spread.shape == (2, 2, 16) and list(found.key_bits) == ["default"]
    bits = found.key_bits["default"]
    assert np.isnan(bits[0]).all() and bits[1].mean() == 3.0 and set(found.output) == {"default", "int4-token"}
    assert found.output["default"][1].max() == pytest.approx(second.worst)
    total = pooled(model, [0, 1], schemes[0], plan, results, "output")
    assert total.value == pytest.approx(second.output / 2**0.5) and total.low <= total.value <= total.high
    alone = Results(tmp_path / "other.jsonl")
    with pytest.raises(ValueError, match="scheme default has not been measured in full"):
        layer_eval.summarize(model, [0], schemes[0], plan, alone)


def test_stack_fills_up() -> None:
    whole = stack([[1.0, 2.0], None, [3.0]])
    assert np.array_equal(whole, [[1, 2], [np.nan] * 2, [3, np.nan]], equal_nan=True)
    assert np.isnan(stack([None, None])).all()


def test_layers_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.image import imread

    folder, out = save_tiny_model(tmp_path / "tiny"), tmp_path / "out"
    args = ["eval", "layers", "--model", str(folder), "--context", "300", "--prefill", "132", "--out", str(out)]
    args += ["--schemes", "default,int4-token"]
    assert main(args) == 0
    told = capsys.readouterr().out
    assert "int4-token (simulated)" in told and "worst head" in told and told.count("packed") >= 2
    assert len(np.unique(imread(out / "layers.png").reshape(-1, 4), axis=0)) > 100
    before = (out / "results.jsonl").read_bytes()
    assert len(before.splitlines()) == 2 * 3  # statistics and two schemes, two layers

    def forbidden(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(layer_eval, "through_cache", forbidden)
    assert main(args) == 0 and (out / "results.jsonl").read_bytes() == before
    assert main([*args, "--prefill", "2"]) == 1 and "--prefill is 2" in capsys.readouterr().err
