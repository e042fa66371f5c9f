"""`mixkvq.estimate` for real checkpoints: every preset within 2 % of the report, thresholds by what was measured."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
from models import forward

from mixkvq import MixKVQCache, estimate, list_presets
from mixkvq.calibrate.reading import calibration_windows, measure_records
from mixkvq.calibration import Calibration
from mixkvq.errors import UserError
from mixkvq.eval.checkpoints import CHECKPOINTS
from mixkvq.eval.models import load, load_config
from mixkvq.eval.replay import Prefill
from mixkvq.eval.texts import windows
from mixkvq.fingerprint import fingerprint
from mixkvq.sizes import records_summary

pytestmark = pytest.mark.slow

TOKENS = 600


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_preset_within_two_percent(name):
    try:
        CHECKPOINTS[name].require()
    except UserError as error:
        pytest.skip(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        compare(load_config(name), *load(name, "float32"))
    finally:
        torch.set_num_threads(before)


def compare(config, model, tokenizer):
    """Read a page of code, its last token alone; thresholds were measured on another page of code."""
    (window,), (other,) = windows(tokenizer, "code", 1, TOKENS), calibration_windows(tokenizer, "code", 1, 900)
    read = Prefill.record(model, torch.tensor([window.ids[:-1]]))
    for preset in list_presets():
        made = None
        if preset == "paper":
            measured = MixKVQCache("paper", config=config)
            Prefill.record(model, torch.tensor([other.ids])).replay(measured)
            summary = {"records": records_summary(measure_records([measured], model.dtype))}
            thresholds = {"thresholds": measured.mixkvq_config.thresholds}
            made = Calibration(fingerprint(config), "paper", thresholds, {}, summary)
        cache = MixKVQCache(preset, calibration=made, config=config)
        read.replay(cache)
        with torch.inference_mode():
            forward(model, cache, torch.tensor([window.ids[-1:]]))
        report = cache.report()
        found = estimate(config, tokens=TOKENS, preset=preset, calibration=made, dtype="float32")
        print(
            f"{config.model_type} {preset}: {report.nbytes:,} bytes, estimated {found.nbytes / report.nbytes - 1:+.4f}"
        )
        assert found.nbytes == pytest.approx(report.nbytes, rel=0.02 if preset == "paper" else 0)
        assert found.true_bits == pytest.approx(report.true_bits, rel=0.04 if preset == "paper" else 1e-9)
        assert found.least_nbytes <= report.nbytes <= found.most_nbytes
        assert found.dynamic_nbytes > found.nbytes or preset == "lossless"
