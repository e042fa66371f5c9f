"""`mixkvq eval kl`: zero where nothing is lost, measured once, summed up right."""

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

from cli_fixtures import save_tiny_model
from models import VOCABULARY, tiny
from versions import needs_new_quantized_cache

from mixkvq.cli import main
from mixkvq.compat import cache_argument
from mixkvq.errors import UserError
from mixkvq.eval import kl
from mixkvq.eval.kl import Protocol, key_of, measure, path_note, summarize
from mixkvq.eval.results import Results
from mixkvq.eval.schemes import parse_scheme, parse_schemes
from mixkvq.eval.texts import Window

FIELDS = {"sink_length": 4, "block_length": 64, "residual_length": 64}
PROTOCOL = Protocol(context=280, prefill=140, sink_length=4, block_length=64)


def ignore(event: str, value: Any) -> None:
    pass


def windows(count: int = 2) -> list[Window]:
    r = np.random.default_rng(0)
    return [Window("noise", i, tuple(r.integers(2, VOCABULARY, PROTOCOL.context).tolist())) for i in range(count)]


def measured(names: str, tmp_path: Path, model: Any = None, count: int = 2) -> tuple[Any, list[Any], Results]:
    model = model or tiny(head_dim=64)
    schemes, results = parse_schemes(names, FIELDS), Results(tmp_path / "results.jsonl")
    measure(model, windows(count), schemes, PROTOCOL, results, ignore)
    return model, schemes, results


def test_nothing_is_lost_without_quantization(tmp_path: Path) -> None:
    model, schemes, results = measured("lossless,simulated/lossless,exact", tmp_path)
    for row in summarize(model, windows(), schemes, PROTOCOL, results):
        assert abs(row.kl.value) < 1e-9 and abs(row.p99) < 1e-9, row.scheme.name
        assert row.agreement.value == 1.0 and abs(row.nll_change.value) < 1e-5
        assert row.positions == 2 * 140
    lossless, simulated, exact = summarize(model, windows(), schemes, PROTOCOL, results)
    assert lossless.true_bits == simulated.true_bits > 32 and exact.true_bits is None and exact.effective_bits == 32
    assert [row.paths for row in (lossless, simulated, exact)] == [{"packed": 2}, {"simulated": 2}, {"native": 2}]
    assert all(path_note(row.scheme.kind, row.paths) == "" for row in (lossless, simulated, exact))


def test_simulated_and_packed_agree(tmp_path: Path) -> None:
    model, schemes, results = measured("default,simulated/default,kivi-2,exact", tmp_path, count=1)
    packed, simulated, kivi, exact = summarize(model, windows(1), schemes, PROTOCOL, results, schemes[0])
    assert packed.true_bits == simulated.true_bits
    assert simulated.kl.value == pytest.approx(packed.kl.value, rel=0.05)
    assert kivi.kl.value > 2 * packed.kl.value > 1e-6
    assert packed.ratio is not None and (packed.ratio.value, packed.ratio.low, packed.ratio.high) == (1, 1, 1)
    assert exact.ratio is not None and abs(exact.ratio.value) < 1e-9


def test_numbers_are_those_of_one_plain_run(tmp_path: Path) -> None:
    """Against KL and likelihoods computed in float64 from two whole passes of the model."""
    from transformers import DynamicCache

    model, schemes, results = measured("default", tmp_path, count=1)
    window, cache = windows(1)[0], schemes[0].cache(model)
    ids, exact = torch.tensor([window.ids]), DynamicCache(config=model.config)
    logits: dict[str, list[Any]] = {"p": [], "q": []}
    with torch.inference_mode():
        for begin, end in zip([0, 140, *PROTOCOL.ends[:-1]], [140, *PROTOCOL.ends], strict=True):
            for name, state in (("p", exact), ("q", cache)):
                logits[name].append(model(ids[:, begin:end], **cache_argument(state)).logits[0].double())
    p, q = (torch.cat(parts[1:]).log_softmax(-1) for parts in logits.values())
    row = results.find(key_of(model, window, PROTOCOL, schemes[0]))
    assert row is not None
    assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-8)
    change = (p - q)[range(139), ids[0, 141:]]
    assert row["nll_change"] == pytest.approx(change.tolist(), rel=1e-3, abs=1e-5)
    assert row["agree"] == (p.argmax(-1) == q.argmax(-1)).int().tolist()
    assert row["true_bits"] == cache.report().true_bits


def test_second_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, schemes, _ = measured("default,int4-token", tmp_path)
    before, again = (tmp_path / "results.jsonl").read_bytes(), Results(tmp_path / "results.jsonl")
    assert len(before.splitlines()) == 4

    def forbidden(*_: Any) -> Any:
        raise AssertionError("measured again")

    seen: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(kl, "_measure_window", forbidden)
        measure(model, windows(), schemes, PROTOCOL, again, lambda event, value: seen.append(value))
    assert seen == [(4, 4)] and (tmp_path / "results.jsonl").read_bytes() == before
    more = [*schemes, parse_scheme("magnitude", FIELDS)]
    measure(model, windows(), more, PROTOCOL, again, lambda event, value: seen.append(value))
    assert (tmp_path / "results.jsonl").read_bytes().startswith(before) and seen[1:] == [(3, 6), (6, 6), (6, 6)]


def test_what_was_not_measured_is_not_summed_up(tmp_path: Path) -> None:
    model, schemes, results = measured("default", tmp_path, count=1)
    with pytest.raises(ValueError, match="scheme default has not been measured"):
        summarize(model, windows(2), schemes, PROTOCOL, results)


def test_other_models_protocols_and_texts_have_other_keys() -> None:
    scheme, (first, second) = parse_scheme("default"), windows()
    keys = [
        key_of(tiny(head_dim=64), first, PROTOCOL, scheme),
        key_of(tiny(head_dim=64), second, PROTOCOL, scheme),
        key_of(tiny(), first, PROTOCOL, scheme),
        key_of(tiny(head_dim=64, dtype=torch.bfloat16), first, PROTOCOL, scheme),
        key_of(tiny(head_dim=64), first, Protocol(280, 141, 4, 64), scheme),
        key_of(tiny(head_dim=64), first, PROTOCOL, parse_scheme("default:value_bits=4")),
    ]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_layers_that_are_not_packed_are_named(tmp_path: Path) -> None:
    model, schemes, results = measured("default,int4-token,exact", tmp_path, tiny("gemma2", "eager"), count=1)
    rows = summarize(model, windows(1), schemes, PROTOCOL, results)
    notes = [path_note(row.scheme.kind, row.paths) for row in rows]
    assert notes == ["1 native, 1 packed", "1 native, 1 simulated", ""]


def test_path_notes() -> None:
    assert path_note("packed", {"packed": 30}) == path_note("transformers", {"quantized": 3}) == ""
    assert path_note("packed", {"dequantized": 2}) == "2 dequantized"
    assert path_note("exact", {"native": 2}) == ""


@pytest.mark.parametrize("prefill", [0, -1, 280, 300])
def test_prefill_must_leave_something(prefill: int) -> None:
    with pytest.raises(UserError, match=f"--prefill is {prefill}, must be from 1 to --context"):
        Protocol(280, prefill)


def test_wrong_window_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="window has 3 tokens, must have 280"):
        measure(
            tiny(head_dim=64),
            [Window("x", 0, (2, 3, 4))],
            [parse_scheme("default")],
            PROTOCOL,
            Results(tmp_path / "r"),
            ignore,
        )


@needs_new_quantized_cache
@pytest.mark.parametrize(("name", "bits"), [("quanto-4", 5.0), ("quanto-2", 3.0), ("hqq-4", 5.0), ("hqq-2", 3.0)])
def test_quantized_caches_of_transformers(name: str, bits: float, tmp_path: Path) -> None:
    """Groups of 64 with a scale and a zero point of 32 bits each, as this float32 model makes them."""
    pytest.importorskip("hqq" if name.startswith("hqq") else "optimum.quanto")
    text = f"{name},{name}:residual_length=512"
    model, schemes, results = measured(text, tmp_path, count=1)
    often, never = summarize(model, windows(1), schemes, PROTOCOL, results)
    for row in (often, never):
        assert path_note(row.scheme.kind, row.paths) == ""
        assert row.true_bits == bits and row.paths == {"quantized": 2} and row.kl.value > 1e-5
    assert never.effective_bits == (bits * 140 + 32 * 140) / 280  # the prompt coded at once, the others exact
    found = [results.find(key_of(model, windows(1)[0], PROTOCOL, scheme)) for scheme in schemes]
    assert [row and row["record_elements"] for row in found] == [2 * 2 * 2 * 64 * n for n in (280, 140)]


@needs_new_quantized_cache
def test_quantized_caches_refuse_windowed_layers() -> None:
    pytest.importorskip("optimum.quanto")
    with pytest.raises(UserError, match=r"scheme quanto-4: .*sliding_attention"):
        parse_scheme("quanto-4").cache(tiny("gemma2", "eager"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    common = [
        "eval",
        "kl",
        "--model",
        str(folder),
        "--domains",
        "prose",
        "--windows",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    args = [*common, "--context", "300", "--prefill", "140", "--schemes", "default,int4-token"]
    assert main(args) == 0
    told = capsys.readouterr().out
    assert "default" in told and "int4-token (simulated)" in told and "160 positions" in told
    assert (tmp_path / "o" / "kl.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "o" / "results.jsonl").read_text().splitlines()]
    assert [row["key"]["scheme"] for row in rows] == ["default", "int4-token"]
    assert all(len(row["values"]["kl"]) == 160 and row["values"]["paths"] for row in rows)
    for wrong, message in ((["--windows", "0"], "--windows is 0"), (["--threads", "0"], "--threads is 0")):
        assert main([*args, *wrong]) == 1
        assert message in capsys.readouterr().err
