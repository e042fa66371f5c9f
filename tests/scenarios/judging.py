"""What must be true of a run with our cache, given the run with the stock cache.

Lossless: the same tokens (or a tie of logits), the same logits to 1e-5 of their range; where a model enlarges rounding
beyond that, to what the stock run's are off from those in float64.

Quantized, by the ``default`` preset (3 bits) and with 8 bits:

* every logit is finite and every shape is that of the stock run;
* of the logits that both runs gave for the same tokens, those that quantization changed are off by less than `COARSE`
  and `FINE` in the median, if there are `ENOUGH`, in units of the deviation of the exact logits; with 8 bits by less
  than with 3. Logits of another row, position or prompt are off by 1.4. Random models with sharp attention enlarge
  every error, so that these bounds are wide; what the presets promise is tested on real models;
* the next step over the packed records gives what it gives over the tensors that they decode to, to 1e-5 of the range
  of the logits, or `PRECISION` where attention runs in the default precision: nothing chaotic about this one.

All: a cache says of itself (lengths, mask sizes, kinds of layers) what the stock cache says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from operator import attrgetter, methodcaller
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from models import assert_same_tokens, relative_gap

from mixkvq import MixKVQCache
from mixkvq.layer import MixKVQLayer
from mixkvq.reasons import Reason
from mixkvq.report import tensors_in

if TYPE_CHECKING:
    from .case import Case

COARSE, FINE, ENOUGH = 1.0, 0.5, 8
TOUCHED = 1e-3
"""Error that rounding does not explain: quantized keys or values were read."""
PRECISION = 1e-3
"""Of attention in the default precision: four times the most that was seen."""


def parts(result: Any) -> list[Any]:
    """What `Case.compare` was given, as a list."""
    return result if isinstance(result, list) else [result]


def assert_same(want: Any, got: Any, tolerance: float, truth: Callable[[], Any]) -> None:
    """The same tokens, or logits that differ by rounding; ``truth`` runs it in float64."""
    gaps = []
    for a, b in zip(parts(want), parts(got), strict=True):
        if hasattr(a, "sequences"):
            assert_same_tokens(a, b, tolerance)
        else:
            assert a.shape == b.shape
            gaps.append(relative_gap(b, a))
    if not all(gap < tolerance for gap in gaps):
        rounding = max(relative_gap(a, exact) for a, exact in zip(parts(want), parts(truth()), strict=True))
        assert all(gap < rounding for gap in gaps)


def assert_sane(want: Any, default: Any, fine: Any) -> None:
    """Quantized runs: finite, and not far from the exact one; see above."""
    coarse_errors, fine_errors = changes(want, default), changes(want, fine)
    if len(coarse_errors) >= ENOUGH:
        assert median(coarse_errors) < COARSE
    if len(fine_errors) >= ENOUGH:
        assert median(fine_errors) < FINE
    if min(len(coarse_errors), len(fine_errors)) >= ENOUGH:
        assert median(fine_errors) < median(coarse_errors)


def changes(want: Any, got: Any) -> list[float]:
    """Errors of the comparable logits that quantization changed."""
    errors = []
    for a, b in zip(parts(want), parts(got), strict=True):
        assert_finite(a, b)
        errors += [relative_error(x, y) for x, y in comparable(a, b)]
    return [error for error in torch.cat(errors).tolist() if error > TOUCHED]


def assert_finite(want: Any, got: Any) -> None:
    """The right shapes and no inf or nan."""
    if hasattr(want, "sequences"):
        assert got.sequences.shape == want.sequences.shape
        assert all(bool(logits.isfinite().all()) for logits in got.logits)
    else:
        assert got.shape == want.shape and bool(got.isfinite().all())


def comparable(want: Any, got: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits [rows, vocabulary] that two runs gave for the same tokens before.

    Of beam search the first two steps: which beams live on after the first is decided by exact logits.
    """
    if not hasattr(want, "sequences"):
        yield want.flatten(0, -2), got.flatten(0, -2)
    elif getattr(want, "sequences_scores", None) is not None:
        yield from list(zip(want.logits, got.logits, strict=False))[:2]
    else:
        begin = want.sequences.shape[1] - len(want.logits)
        same = (want.sequences == got.sequences).cumprod(1).bool()
        for step, pair in enumerate(zip(want.logits, got.logits, strict=True)):
            rows = same[:, begin + step - 1]
            yield tuple(logits[rows] for logits in pair)


def relative_error(want: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Error of every row of logits, in units of the deviation of the exact ones."""
    return (got - want).norm(dim=-1) / (want - want.mean(-1, keepdim=True)).norm(dim=-1)


# ---- state ---------------------------------------------------------------------------------------------------------
_ATTRIBUTES = ("is_initialized", "is_compileable", "is_croppable", "is_sliding", "is_linear", "is_dummy", "batch_size")


def assert_same_books(stock: Any, cache: Any) -> None:
    """What a cache says of itself is what the stock cache says, where that does not raise."""
    for question in _questions(len(stock)):
        try:
            want = question(stock)
        except Exception:
            continue
        assert question(cache) == want


def _questions(layers: int) -> Iterator[Callable[[Any], Any]]:
    yield len
    yield from map(attrgetter, _ATTRIBUTES)
    yield methodcaller("get_seq_length")
    yield methodcaller("get_max_length")
    for index in range(layers):
        yield methodcaller("get_seq_length", index)
        yield methodcaller("has_previous_state", index)
        yield methodcaller("get_mask_sizes", 1, index)
        yield methodcaller("get_mask_sizes", 7, index)


COMPARED = Reason("decoded for comparison", "nothing to do")


def decode(cache: MixKVQCache) -> None:
    """Every packed layer holds what its records decode to."""
    for layer in cache.layers:
        if isinstance(layer, MixKVQLayer) and layer.store is not None:
            layer.become_native(COMPARED)


def assert_reads_what_it_holds(case: Case, cache: Any, tolerance: float) -> None:
    """The next step over packed records gives what it gives over the tensors that they decode to."""
    layers = case.ours(cache).layers
    packed = [layer for layer in layers if getattr(layer, "store", None) is not None]
    if not packed or any(held.requires_grad for layer in layers for held in tensors_in(vars(layer))):
        return  # tensors with a graph cannot be copied
    for layer in packed:
        layer.overlooked()  # what the next update would pack
    decoded = copy.deepcopy(cache)
    decode(case.ours(decoded))
    start, columns = packed[0].store.start, packed[0].length + 1
    mask = (torch.arange(columns) >= start.view(-1, 1)).long()
    ids = torch.arange(2, 2 + len(start)).view(-1, 1)
    want, got = (case.forward(c, ids, mask) for c in (decoded, cache))
    assert relative_gap(got, want) < tolerance
