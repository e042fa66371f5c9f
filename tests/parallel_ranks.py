"""What one process of several computes: launched by torchrun, or called by a test for the single process.

    torchrun --standalone --nproc-per-node 2 tests/parallel_ranks.py FOLDER TP PP

``FOLDER/task.pt`` has the models' folders, the presets and the prompts. Every process writes ``FOLDER/rank<N>.pt``: for
every model what `answer` gives, by preset, or why the cache refused it. Presets that end in " in order" are answered
with sums over processes in their order: gloo's order for more than two depends on where in a tensor a number stands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from models import generate
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from mixkvq import MixKVQCache

PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others before it fails."""

_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_BY_INPUT = ("o_proj", "down_proj")


def answer(
    model: Any, preset: str, inputs: dict[str, torch.Tensor], new_tokens: int = 24, precision: str = "default"
) -> dict[str, Any]:
    """Tokens, logits, and what every layer of the cache holds after a batch."""
    cache = MixKVQCache(preset, precision=precision)
    result = generate(model, inputs, cache, new_tokens)
    report = cache.report()
    return {
        "tokens": result.sequences,
        "logits": torch.stack(result.logits),
        "nbytes": report.nbytes,
        "layers": [held(layer, about) for layer, about in zip(cache.layers, report.layers, strict=True)],
    }


def held(layer: Any, about: Any) -> dict[str, Any]:
    """Path, tokens and bytes of a layer, its records by (row, head, block), and the bytes that no head owns."""
    found = {"path": about.path, "tokens": about.tokens, "nbytes": about.nbytes, "record_bytes": about.record_bytes}
    store = layer.store
    if store is None:
        return {**found, "records": {}, "of_rows": 0}
    records = {
        (row, head, block): store.record(row, head, block)
        for row, blocks in enumerate(store.blocks.tolist())
        for head in range(store.k.shape[1])
        for block in range(blocks)
    }
    of_rows = [t for t in store.tensors() if t.shape == (len(store.exact),)]  # tokens, starts, blocks, queries seen
    return {**found, "records": records, "of_rows": sum(t.untyped_storage().nbytes() for t in of_rows)}


@contextmanager
def in_parts(model: Any, parts: int) -> Iterator[None]:
    """Let the linear layers of a Llama compute as ``parts`` processes do: in slices, of which some are added up."""
    changed = []
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in _BY_OUTPUT:
            module.forward = _Slices(module.weight.chunk(parts, 0), add=False)
        elif kind in _BY_INPUT:
            module.forward = _Slices([w.contiguous() for w in module.weight.chunk(parts, 1)], add=True)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class _Slices:
    """A linear layer in slices of its output, or (``add``) of its input."""

    def __init__(self, weights: Sequence[torch.Tensor], *, add: bool) -> None:
        self.weights, self.add = weights, add

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.add:
            return torch.cat([linear(x, w) for w in self.weights], -1)
        inputs = x.chunk(len(self.weights), -1)
        first, *others = (linear(part.contiguous(), w) for part, w in zip(inputs, self.weights, strict=True))
        return sum(others, first)


IN_ORDER = " in order"


def asked(model: Any, preset: str, inputs: dict[str, torch.Tensor], new_tokens: int) -> dict[str, Any]:
    """As `answer`, in one of several processes."""
    stock = torch.distributed.all_reduce
    if preset.endswith(IN_ORDER):
        torch.distributed.all_reduce = _add_in_order
    try:
        return answer(model, preset.removesuffix(IN_ORDER), inputs, new_tokens)
    finally:
        torch.distributed.all_reduce = stock


def _add_in_order(tensor: torch.Tensor, group: Any = None) -> None:
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, tensor, group)
    first, *others = parts
    tensor.copy_(sum(others, first))


def main(folder: str, tp: str, pp: str) -> None:
    """Load this process's part of the models and answer with every preset."""
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    sizes = DistributedConfig(tp_size=int(tp), pp_size=int(pp))
    task = torch.load(Path(folder) / "task.pt", weights_only=True)
    answers: dict[str, Any] = {}
    for name, where in task["models"].items():
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, distributed_config=sizes).eval()
        model.generation_config.eos_token_id = None
        try:
            given = task["inputs"], task["new_tokens"]
            answers[name] = {preset: asked(model, preset, *given) for preset in task["presets"]}
        except ValueError as error:
            answers[name] = str(error)
    torch.save(answers, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
