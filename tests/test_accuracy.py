"""What the presets promise, on SmolLM2-135M-Instruct and text that every Python has: ``pytest -m accuracy``.

All schemes have sink_length 4 and residual_length 128. Bounds are on ratios of KL divergences of the same positions;
`mixkvq eval kl` prints the same table for any model and text.
"""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("scipy")
from mixkvq import MixKVQConfig
from mixkvq.calibrate.reading import calibration_windows
from mixkvq.calibrate.thresholds import scale_thresholds
from mixkvq.errors import UserError
from mixkvq.eval.checkpoints import SMOLLM2
from mixkvq.eval.kl import Protocol, Summary, measure, summarize
from mixkvq.eval.models import load
from mixkvq.eval.replay import Prefill
from mixkvq.eval.results import Results
from mixkvq.eval.schemes import parse_scheme, parse_schemes
from mixkvq.eval.texts import DOMAINS, windows

pytestmark = [pytest.mark.slow, pytest.mark.accuracy]
PACKED = "default,compact,near-lossless,kivi-2,kivi-4,fixed,error-only"
PRESETS = ("default", "compact", "near-lossless", "kivi-2", "kivi-4")
SIMULATED = ",".join(f"simulated/{name}" for name in PRESETS)
RIVALS = "query-only,magnitude,random-tiers,int4-token,hadamard-token"
FIELDS = {"sink_length": 4, "residual_length": 128}
PROTOCOL = Protocol()


@pytest.fixture(scope="module")
def smollm2():
    try:
        SMOLLM2.require()
    except UserError as error:
        pytest.skip(str(error))
    return load(dtype="float32")


@pytest.fixture(scope="module")
def texts(smollm2):
    return [window for name in DOMAINS for window in windows(smollm2[1], name, 1, PROTOCOL.context)]


def kl_table(model, texts, schemes, path, baseline):
    results = Results(path)
    measure(model, texts, schemes, PROTOCOL, results, lambda *event: None)
    return {row.scheme.name: row for row in summarize(model, texts, schemes, PROTOCOL, results, baseline)}


@pytest.fixture(scope="module")
def paper(smollm2) -> str:
    """The published pair of thresholds, scaled to 2.6 bits per key code on other text."""
    model, tokenizer = smollm2
    text = calibration_windows(tokenizer, "prose", 1, PROTOCOL.context)[0]
    prefill = Prefill.record(model, torch.tensor([text.ids]))
    found = scale_thresholds(model, [prefill], MixKVQConfig.preset("paper", **FIELDS), 2.6)
    assert 2.55 < found.code_bits <= 2.6
    return f"paper:thresholds=[{found.thresholds[0]:.4f},{found.thresholds[1]:.4f}]"


@pytest.fixture(scope="module")
def table(smollm2, texts, paper, tmp_path_factory) -> dict[str, Summary]:
    schemes = parse_schemes(f"{PACKED},{SIMULATED},{RIVALS},{paper}", FIELDS)
    return kl_table(smollm2[0], texts, schemes, tmp_path_factory.mktemp("kl") / "kl.jsonl", schemes[0])


def ratio(table, name, other):
    return table[name].kl.value / table[other].kl.value


def test_all_positions_count(table):
    assert {row.positions for row in table.values()} == {3 * 512}


@pytest.mark.parametrize(
    ("name", "most"), [("default", 3.29), ("compact", 2.48), ("near-lossless", 4.29), ("kivi-2", 3.04)]
)
def test_true_bits(table, name, most):
    assert table[name].true_bits <= most


def test_default_is_close_to_the_exact_cache(table):
    assert table["default"].kl.value <= 0.0095 and table["default"].agreement.value >= 0.94


def test_default_is_far_better_than_the_published_method_at_no_more_bits(table, paper):
    assert ratio(table, "default", paper) <= 0.35 and table["default"].true_bits <= table[paper].true_bits


def test_compact_is_far_better_than_kivi_2_at_fewer_bits(table):
    assert ratio(table, "compact", "kivi-2") <= 0.35


def test_near_lossless_is_as_good_as_kivi_4_at_fewer_bits(table):
    assert ratio(table, "near-lossless", "kivi-4") <= 1.0


@pytest.mark.parametrize("rival", ["error-only", "magnitude", "random-tiers"])
def test_the_same_bits_are_best_given_to_salient_channels(table, rival):
    """The size of queries alone does as well as both factors together on this model: not asserted."""
    assert ratio(table, rival, "fixed") > 1.0
    assert ratio(table, rival, "query-only") > 1.0


@pytest.mark.parametrize("rival", ["int4-token", "hadamard-token"])
def test_per_token_groups_lose_at_more_bits(table, rival):
    assert ratio(table, rival, "default") > 1.3 and table[rival].true_bits > table["default"].true_bits


@pytest.mark.parametrize("name", PRESETS)
def test_the_packed_path_agrees_with_the_reference(table, name):
    assert 0.97 <= ratio(table, name, f"simulated/{name}") <= 1.03


def test_tiers_follow_the_queries_not_the_size_of_keys(smollm2, texts, tmp_path):
    """Keys of a rotary pair times s, queries divided by s: the same model, the same bits; ranking by |k| is misled."""
    model = copy.deepcopy(smollm2[0])
    config, head_dim = model.config, model.config.head_dim
    for index, layer in enumerate(model.model.layers):
        generator = torch.Generator().manual_seed(index)
        attention = layer.self_attn
        for head in range(config.num_key_value_heads):
            exponent = torch.randint(-3, 4, (head_dim // 2,), generator=generator).repeat(2)
            scale, group = 2.0**exponent, config.num_attention_heads // config.num_key_value_heads
            with torch.no_grad():
                attention.k_proj.weight.view(-1, head_dim, config.hidden_size)[head] *= scale[:, None]
                queries = attention.q_proj.weight.view(-1, head_dim, config.hidden_size)
                queries[head * group : (head + 1) * group] /= scale[:, None]
    schemes = parse_schemes("fixed,magnitude,default", FIELDS)
    before = kl_table(smollm2[0], texts[:1], schemes, tmp_path / "before.jsonl", schemes[0])
    after = kl_table(model, texts[:1], schemes, tmp_path / "after.jsonl", schemes[0])
    assert after["default"].kl.value == pytest.approx(before["default"].kl.value, rel=0.05)
    assert ratio(after, "magnitude", "fixed") > 1.4 * ratio(before, "magnitude", "fixed")


def test_thresholds_span_kivi_2_and_exact_keys(smollm2, texts, tmp_path):
    names = [
        "paper:thresholds=[1e30,1e30]",
        "paper:thresholds=[0,0]",
        "kivi-2",
        "kivi-2:value_bits=2:allocate=threshold:thresholds=[0,0]",
    ]
    schemes = [parse_scheme(name, FIELDS) for name in names]
    found = kl_table(smollm2[0], texts[:1], schemes, tmp_path / "kl.jsonl", schemes[0])
    all_low, all_exact, kivi, kivi_exact = (found[name] for name in names)
    assert all_low.kl.value == kivi.kl.value and all_low.true_bits == kivi.true_bits
    assert all_exact.kl.value == kivi_exact.kl.value < kivi.kl.value
