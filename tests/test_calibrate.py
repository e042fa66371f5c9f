"""`mixkvq calibrate`: thresholds for a number of bits, the search, profiles; on tiny random models."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
for package in ("optuna", "scipy", "typer", "rich"):
    pytest.importorskip(package)
from cli_fixtures import WORDS, save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from models import forward, tiny

from mixkvq import MixKVQCache, MixKVQConfig, compat, estimate
from mixkvq.calibrate.profile import Choice, allocate, hull, key_choices, make_profile, value_choices
from mixkvq.calibrate.reading import Readings, calibration_windows
from mixkvq.calibrate.study import Trial, cut_off, pareto, pick, search
from mixkvq.calibrate.thresholds import code_bits, scale_thresholds
from mixkvq.calibration import Calibration
from mixkvq.cli import main
from mixkvq.cli.calibrate import CalibrateOptions
from mixkvq.errors import UserError
from mixkvq.eval.kl import Protocol
from mixkvq.eval.models import load
from mixkvq.eval.texts import Window, windows
from mixkvq.sizes import measured_records

PROTOCOL = Protocol(context=420, prefill=300, sink_length=0)
PAPER = MixKVQConfig.preset("paper")


def quiet(event, value):
    pass


def text(seed, tokens=420):
    ids = torch.randint(2, 97, (tokens,), generator=torch.Generator().manual_seed(seed))
    return Window("random", seed, tuple(ids.tolist()))


@pytest.fixture(scope="module")
def readings():
    return Readings(tiny(), [text(1)], PROTOCOL)


# ---- thresholds ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", [2.0, 2.6, 5.0])
def test_scaled_thresholds_reach_the_target_from_below(readings, target):
    found = scale_thresholds(readings.model, readings.prefills, PAPER, target)
    high, low = found.thresholds
    assert high / low == pytest.approx(1.44 / 0.79)
    assert found.code_bits == code_bits(readings.model, readings.prefills, PAPER.replace(thresholds=(high, low)))
    assert found.code_bits <= target
    lower = PAPER.replace(thresholds=(high / 1.01, low / 1.01))
    assert target == 2.0 or code_bits(readings.model, readings.prefills, lower) > target


def test_extreme_thresholds_span_the_tiers(readings):
    for pair, bits in (((1e9, 1e9), 2), ((1e9, 0), 4), ((0, 0), 16)):
        assert code_bits(readings.model, readings.prefills, PAPER.replace(thresholds=pair)) == bits


def test_targets_and_ratios_out_of_range(readings):
    with pytest.raises(ValueError, match="target is 1"):
        scale_thresholds(readings.model, readings.prefills, PAPER, 1)
    with pytest.raises(ValueError, match=r"ratio is 0\.5"):
        scale_thresholds(readings.model, readings.prefills, PAPER, 3, ratio=0.5)
    with pytest.raises(ValueError, match="nothing was packed"):
        scale_thresholds(readings.model, [], PAPER, 3)


# ---- search --------------------------------------------------------------------------------------------------------
def test_a_study_goes_on_where_it_stopped(readings, tmp_path):
    told = []
    first = search(readings, PAPER, 2, 0, tmp_path / "s.log", "study", quiet)
    more = search(readings, PAPER, 3, 0, tmp_path / "s.log", "study", lambda event, value: told.append(value))
    assert len(first) == 2 and more[:2] == first and told == [(2, 3), (3, 3)]
    assert len({trial.thresholds for trial in more}) == 3
    assert more == search(readings, PAPER, 3, 0, tmp_path / "whole.log", "study", quiet)
    for trial in more:
        high, low = trial.thresholds
        assert 0.1 <= low <= high <= 2.0 and trial.kl > 0 and trial.true_bits > 3


def test_a_wider_range_is_a_study_of_its_own(folder, tmp_path, capsys):
    out = tmp_path / "c.json"
    for highest in ("2", "1000"):
        assert run(folder, out, "--trials", "2", "--highest", highest) == 0
        assert "Best of 2 pairs" in capsys.readouterr().out  # none of the other study
    assert max(json.loads(out.read_text())["fields"]["thresholds"]) > 2


def test_the_front_and_the_choice():
    trials = [Trial((1, 1), kl, bits) for kl, bits in ((0.5, 3.0), (0.2, 3.5), (0.3, 3.6), (0.1, 5.0))]
    front = pareto(trials)
    assert [t.true_bits for t in front] == [3.0, 3.5, 5.0]
    assert pick(front, 3.6).kl == 0.2 and pick(front, None).kl == 0.1
    for highest, cut in ((1, True), (1.1, True), (1.2, False)):
        assert cut_off(front[0], highest) is cut
    with pytest.raises(UserError, match=r"--max-bits is 2.*3\.00"):
        pick(front, 2)


# ---- profiles ------------------------------------------------------------------------------------------------------
items = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(items, st.integers(0, 40))
def test_a_profile_stays_within_its_budget_and_is_near_the_best(raw, extra):
    choices = [[Choice({"n": i}, float(b), float(kl)) for i, (b, kl) in enumerate(item)] for item in raw]
    least = sum(min(c.nbytes for c in item) for item in choices)
    budget = least + extra
    chosen = allocate(choices, budget)
    assert sum(c.nbytes for c in chosen) <= budget
    best = min(
        sum(c.kl for c in combination)
        for combination in itertools.product(*choices)
        if sum(c.nbytes for c in combination) <= budget
    )
    # greedy along hulls is optimal but for the step that no longer fits in each item
    slack = sum(max((a.kl - b.kl for a, b in itertools.pairwise(hull(item))), default=0) for item in choices)
    assert best <= sum(c.kl for c in chosen) <= best + slack


def test_a_hull_falls_ever_slower():
    random_ = random.Random(0)
    kept = hull([Choice({}, float(random_.randint(1, 60)), random_.random()) for _ in range(40)])
    gains = [(a.kl - b.kl) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(kept)]
    assert len(gains) > 1 and all(x > y > 0 for x, y in itertools.pairwise(gains))


def test_a_budget_below_the_least_is_refused():
    with pytest.raises(ValueError, match="budget is 1 bytes, the smallest choices take 5"):
        allocate([[Choice({}, 5.0, 0.0)]], 1)


@pytest.mark.parametrize("preset", ["default", "compact", "near-lossless"])
def test_choices_are_valid_and_hold_the_presets_own(preset):
    config = MixKVQConfig.preset(preset)
    for choices in (key_choices(config), value_choices(config)):
        made = [config.replace(**fields) for fields in choices]
        assert config in made and len(set(made)) == len(made) >= 3


def test_a_profile_is_made_and_judged_on_other_texts(readings):
    told = []
    found = make_profile(
        readings, Readings(tiny(), [text(2)], PROTOCOL), "default", {"sink_length": 0}, lambda *e: told.append(e)
    )
    assert told[-1][1][0] == told[-1][1][1] == 2 * (3 + 6)
    assert found.true_bits[0] <= found.true_bits[1] + 1e-9
    assert found.calibration.fields == {"sink_length": 0} and set(found.calibration.layers) <= {0, 1}
    assert found.ratio.value == pytest.approx(found.kl[0] / found.kl[1])


# ---- text and command ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    words = np.random.default_rng(0).choice(WORDS, 6000)
    (folder / "text.txt").write_text(" ".join(words))
    return folder


def test_calibration_reads_other_positions_than_eval(folder):
    from transformers import AutoTokenizer

    tokenizer, path = AutoTokenizer.from_pretrained(folder), str(folder / "text.txt")
    ids = tokenizer((folder / "text.txt").read_text())["input_ids"]

    def places(found):
        begins = [next(i for i in range(len(ids)) if tuple(ids[i : i + 200]) == w.ids) for w in found]
        return {i for begin in begins for i in range(begin, begin + 200)}

    for ours, theirs in itertools.product((1, 2, 4), (1, 2, 3, 4, 6)):  # n (m + 1) 200 tokens, of 6000
        calibrate = places(calibration_windows(tokenizer, path, ours, 200))
        assert len(calibrate) == 200 * ours and not calibrate & places(windows(tokenizer, path, theirs, 200))


def test_calibration_reads_other_problems_than_eval(folder, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, path = AutoTokenizer.from_pretrained(folder), tmp_path / "p.jsonl"
    rows = [{"question": " ".join([WORDS[i % 16], WORDS[i // 16]] * 5), "answer": f"x #### {i}"} for i in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    pairs = []
    for found in (calibration_windows(tokenizer, str(path), 2, 300), windows(tokenizer, str(path), 2, 300)):
        text = " ".join(tokenizer.decode(w.ids) for w in found)
        pairs.append({tuple(part.split()[:2]) for part in text.split("user ")[1:] if len(part.split()) > 1})
    assert len(pairs[0]) > 20 and len(pairs[1]) > 20 and not pairs[0] & pairs[1]
    with pytest.raises(UserError, match="too few problems for 40 windows"):
        calibration_windows(tokenizer, str(path), 40, 300)
    made = [windows(tokenizer, "maths", 1, 300)[0].ids, calibration_windows(tokenizer, "maths", 1, 300)[0].ids]
    assert made[0] != made[1]


def run(folder, out, *more):
    options = ["--model", str(folder), "--domains", str(folder / "text.txt"), "--context", "420", "--prefill", "300"]
    return main(["calibrate", *options, "--out", str(out), *more])


def test_the_command_writes_what_a_cache_reads(folder, tmp_path, capsys):
    out = tmp_path / "new" / "c.json"
    assert run(folder, out, "--target-bits", "2.6", "--sink", "4") == 0
    made = Calibration.load(out)
    assert made.preset == "paper" and made.fields["sink_length"] == 4
    assert made.summary["key_code_bits"] <= 2.6
    assert f"{made.fields['thresholds'][1]:.4f}" in capsys.readouterr().out
    cache = MixKVQCache("paper", calibration=out)
    assert cache.mixkvq_config.thresholds == made.fields["thresholds"]


@pytest.mark.skipif(not compat.RUNS_WITHOUT_NUMBERS, reason="before transformers 5.0 no model runs without numbers")
def test_what_was_measured_estimates_the_bytes_of_another_text(folder, tmp_path, capsys):
    out = tmp_path / "c.json"
    assert run(folder, out, "--trials", "0") == 0
    made = Calibration.load(out)
    assert (
        made.fields["thresholds"] == PAPER.thresholds and f"{made.summary['true_bits']:.3f}" in capsys.readouterr().out
    )
    assert sorted(made.summary["records"]["layers"]) == ["0", "1"]
    model, tokenizer = load(str(folder))
    for dtype in (torch.float32, torch.bfloat16):
        cache, ids = MixKVQCache("paper", calibration=out), windows(tokenizer, str(folder / "text.txt"), 1, 400)[0].ids
        with torch.inference_mode():
            forward(model.to(dtype), cache, torch.tensor([ids]))
        found = estimate(model.config, tokens=400, preset="paper", calibration=out, dtype=dtype)
        report = cache.report()
        assert found.preset == report.preset
        assert found.nbytes == pytest.approx(report.nbytes, rel=0.02)
        assert found.true_bits == pytest.approx(report.true_bits, rel=0.05)
    other = estimate(model.config, tokens=400, preset="paper", calibration=out, thresholds=(2.0, 1.0))
    assert other.nbytes is None  # these were not measured


def test_records_that_nobody_measured_are_refused():
    for records in (3, {"dtype": "int8", "layers": {}}, {"dtype": "float32", "layers": {"0": [1]}}):
        with pytest.raises(ValueError, match="must be a dtype and, for each layer"):
            measured_records({"records": records})
    assert measured_records({}) == {}


def test_the_search_command(folder, tmp_path, capsys):
    out = tmp_path / "c.json"
    assert run(folder, out, "--trials", "2") == 0
    assert "Best of 2 pairs" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10000 and out.with_suffix(".study.log").exists()
    assert json.loads(out.read_text())["summary"]["trials"] == 2


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"preset": "papr"}, "--preset.*papr"),
        ({"preset": "kivi-2"}, "nothing to calibrate"),
        ({"preset": "default", "target_bits": 3.0}, "for thresholds"),
        ({"target_bits": 1.0}, "--target-bits is 1"),
        ({"trials": -1}, "--trials is -1"),
        ({"highest": 0.1}, r"--highest is 0\.1"),
        ({"highest": float("nan")}, "--highest is nan"),
        ({"sink": -1}, "--sink is -1"),
    ],
)
def test_wrong_options(fields, match):
    with pytest.raises(UserError, match=match):
        CalibrateOptions(model="m", **fields)


# ---- a real model --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_smollm2_reaches_its_bits_on_other_text(tmp_path, capsys):
    """Thresholds scaled on prose give nearly the same bits on code, where the published pair gives far more."""
    from mixkvq.eval.checkpoints import SMOLLM2
    from mixkvq.eval.replay import Prefill

    try:
        SMOLLM2.require()
    except UserError as error:
        pytest.skip(str(error))
    out = tmp_path / "c.json"
    command = ["calibrate", "--target-bits", "2.6", "--domains", "prose", "--context", "900", "--prefill", "800"]
    assert main([*command, "--threads", "1", "--out", str(out)]) == 0
    made = Calibration.load(out)
    assert 2.59 < made.summary["key_code_bits"] <= 2.6 and 0 < made.summary["kl_nats"] < 0.2
    model, tokenizer = load(SMOLLM2.name, "float32")
    code = Prefill.record(model, torch.tensor([windows(tokenizer, "code", 1, 800)[0].ids]))
    scaled = code_bits(model, [code], PAPER.replace(thresholds=made.fields["thresholds"]))
    assert 2.3 < scaled < 2.9 and code_bits(model, [code], PAPER) > scaled + 1
