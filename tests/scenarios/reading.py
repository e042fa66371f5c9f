"""Forward passes: pieces of any size, masks of any kind."""

from __future__ import annotations

import torch

from .case import Case, scenario


@scenario()
def token_by_token(case: Case) -> None:
    def run(cache):
        reader = case.reader(cache)
        reader.steps(75)
        return reader.logits

    case.compare(run)


@scenario()
def pieces_of_every_size(case: Case) -> None:
    def run(cache):
        reader = case.reader(cache)
        for size in (1, 40, 2, 33, 64, 1, 7, 31, 21):
            reader.read(size)
        return reader.logits

    case.compare(run)


@scenario()
def right_padding_and_holes(case: Case) -> None:
    """Masked tokens after the first real one are stored and stay masked."""

    def run(cache):
        mask = torch.ones(2, 90, dtype=torch.long)
        mask[0, 70:] = 0
        mask[1, :10] = 0
        mask[1, 30:40] = 0
        reader = case.reader(cache, batch=2)
        reader.read(90, mask)
        reader.steps(12)
        return reader.logits

    case.compare(run)


@scenario()
def dead_rows(case: Case) -> None:
    """Until every row has a real token nothing is packed; then rows begin where their first token is."""

    def run(cache):
        reader = case.reader(cache, batch=2)
        alive = torch.ones(2, 130, dtype=torch.long)
        alive[1, :60] = 0
        for begin, end in ((0, 50), (50, 90), (90, 120), *((i, i + 1) for i in range(120, 130))):
            reader.read(end - begin, alive[:, begin:end])
        return reader.logits

    case.compare(run)


def _own_masks(case: Case, cache, convert) -> list[torch.Tensor]:
    """A prefix that sees itself both ways, and 7 tokens of padding; short enough for sliding windows."""
    whole = torch.ones(2, 1, 47, 47, dtype=torch.bool).tril()
    whole[..., :20, :20] = True
    whole[1, ..., :7] = False
    reader, at = case.reader(cache, batch=2), 0
    for size in (37, 3, 1, 1, 5):
        reader.read(size, own_mask=convert(whole[:, :, at : at + size, : at + size]))
        at += size
    reader.logits[0] = reader.logits[0].view(2, 37, -1)[:, 7:]
    return reader.logits


@scenario()
def own_bool_masks(case: Case) -> None:
    case.compare(lambda cache: _own_masks(case, cache, lambda mask: mask))


def _own_additive_masks(case: Case, hidden: float) -> None:
    def additive(mask):
        return torch.zeros(mask.shape, dtype=case.dtype).masked_fill(~mask, hidden)

    case.compare(lambda cache: _own_masks(case, cache, additive))


@scenario()
def own_additive_masks(case: Case) -> None:
    _own_additive_masks(case, torch.finfo(case.dtype).min)


@scenario(families=("llama", "gemma2"))
def own_mild_additive_masks(case: Case) -> None:
    """As BERT and T5 made them once."""
    _own_additive_masks(case, -10000.0)
