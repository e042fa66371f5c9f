"""The numbers of the demo, against numbers computed by hand."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cli_fixtures import save_tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

from mixkvq import MixKVQCache
from mixkvq.cli.score import Score, teacher_forced
from mixkvq.compat import cache_argument
from mixkvq.eval.forced import chunk_ends, kl_divergence
from mixkvq.eval.memory import bf16_nbytes, cache_nbytes


def ignore(event: str, value: Any) -> None:
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("tiny"))).eval()


def text(model: Any, n: int) -> Any:
    return torch.randint(0, model.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(1))


def test_kl_by_hand() -> None:
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)  # = 0.25 ln 2
    logits = [torch.tensor([x, x]).log() + 3.0 for x in (p, q)]  # a constant in the logits changes nothing
    assert kl_divergence(*logits).tolist() == pytest.approx([by_hand, by_hand], abs=1e-6)
    assert by_hand == pytest.approx(0.25 * math.log(2))
    assert kl_divergence(logits[0], logits[0]).tolist() == [0, 0]


def test_kl_is_not_symmetric_and_keeps_its_direction() -> None:
    p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), abs=1e-6)
    assert kl_divergence(q, p).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), abs=1e-6)


def test_kl_of_16_bit_logits_is_computed_in_float32() -> None:
    logits = torch.tensor([[2.0, 1.0, -4.0]], dtype=torch.bfloat16)
    other = torch.tensor([[1.0, 2.0, -4.0]], dtype=torch.bfloat16)
    assert kl_divergence(logits, other).item() == pytest.approx(
        kl_divergence(logits.double(), other.double()).item(), abs=1e-6
    )


@pytest.mark.parametrize(
    ("first", "last", "sinks", "block", "ends"),
    [
        (1536, 2048, 4, 128, [1540, 1668, 1796, 1924, 2048]),  # the protocol of docs/results
        (1540, 1668, 4, 128, [1668]),
        (1, 140, 4, 128, [132, 140]),
        (2, 100, 4, 128, [100]),
        (10, 70, 0, 32, [32, 64, 70]),
    ],
)
def test_chunks_end_on_block_borders(first: int, last: int, sinks: int, block: int, ends: list[int]) -> None:
    assert list(chunk_ends(first, last, sinks, block)) == ends


def test_means_over_all_and_over_the_first_positions() -> None:
    score = Score(prefill=10, chunks=2, kl=[0.0, 1.0, 5.0], agree=[True, False, False], trace=[])
    assert score.mean_kl() == 2 and score.mean_kl(2) == 0.5
    assert score.agreement() == pytest.approx(1 / 3) and score.agreement(2) == 0.5


def test_the_exact_cache_against_itself(model: Any) -> None:
    ids = text(model, 200)
    score = teacher_forced(model, ids, 100, DynamicCache(), DynamicCache(), 4, 32, ignore)
    assert score.kl == [0.0] * 100 and all(score.agree)
    assert [t for t, _, _ in score.trace] == [100, *chunk_ends(100, 200, 4, 32)]
    for tokens, exact, other in score.trace:
        assert exact == other == 2 * 4 * 2 * 2 * 16 * tokens  # K and V, float32, 2 layers, 2 heads, head_dim 16
        assert exact == 2 * bf16_nbytes(model.config, tokens)


def test_lossless_scores_zero_and_default_does_not(model: Any) -> None:
    ids = text(model, 400)
    lossless = teacher_forced(model, ids, 260, DynamicCache(), MixKVQCache("lossless"), 0, 128, ignore)
    assert max(lossless.kl) < 1e-6 and all(lossless.agree)
    coded = teacher_forced(model, ids, 260, DynamicCache(), MixKVQCache("default"), 4, 128, ignore)
    rough = teacher_forced(model, ids, 260, DynamicCache(), MixKVQCache("kivi-2", sink_length=4), 4, 128, ignore)
    assert 1e-6 < coded.mean_kl() < rough.mean_kl()
    assert coded.trace[-1][2] < 0.6 * coded.trace[-1][1]


def test_chunks_on_block_borders_equal_single_tokens(model: Any) -> None:
    """What makes the protocol honest: the same KL as feeding token by token."""
    ids = text(model, 300)
    chunked = teacher_forced(model, ids, 150, DynamicCache(), MixKVQCache("default"), 4, 128, ignore)
    single: list[float] = []
    exact, ours = DynamicCache(), MixKVQCache("default")
    with torch.inference_mode():
        for cache in (exact, ours):
            model(ids[:, :150], **cache_argument(cache))
        for i in range(150, 300):
            p, q = (model(ids[:, i : i + 1], **cache_argument(cache)).logits[0] for cache in (exact, ours))
            single += kl_divergence(p, q).tolist()
    assert chunked.kl == pytest.approx(single, rel=1e-3, abs=1e-5)


def test_cache_nbytes_of_an_exact_cache(model: Any) -> None:
    cache = DynamicCache()
    assert cache_nbytes(cache) == 0
    model(text(model, 7), **cache_argument(cache))
    assert cache_nbytes(cache) == 2 * 2 * 2 * 7 * 16 * 4


def test_cache_nbytes_of_ours_is_its_report(model: Any) -> None:
    cache = MixKVQCache("default")
    model(text(model, 300), **cache_argument(cache))
    assert cache_nbytes(cache) == cache.report().nbytes > 0


def test_progress_is_told(model: Any) -> None:
    events: list[tuple[str, Any]] = []
    teacher_forced(model, text(model, 80), 40, DynamicCache(), DynamicCache(), 0, 32, lambda *e: events.append(e))
    assert events == [("layer", (1, 2)), ("layer", (2, 2)), ("chunk", (24, 40)), ("chunk", (40, 40))]


def test_kl_of_nearly_equal_logits_is_not_the_noise_of_float32() -> None:
    p = torch.randn(20, 5000, generator=torch.Generator().manual_seed(2)) * 4
    shift = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    for size in (0.0, 1e-6, 1e-4, 1e-2, 1.0, 20.0):
        q = p + size * shift
        a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
        found = kl_divergence(p, q)
        assert (found >= 0).all()
        assert found.tolist() == pytest.approx((a.exp() * (a - b)).sum(-1).tolist(), rel=5e-3, abs=1e-11)


def test_kl_of_disjoint_logits() -> None:
    p, q = torch.tensor([[0.0, -300.0]]), torch.tensor([[-300.0, 0.0]])
    assert kl_divergence(p, q).item() == pytest.approx(300)
    assert kl_divergence(p, p + 1000).item() == 0
