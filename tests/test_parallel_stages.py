"""A pipeline stage fills some layers of its cache; the others never get tokens. Every method takes that in its stride.

Two stages run one after the other in this process, each with its own cache, and must give what the whole model gives.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from family_fields import WINDOW
from models import forward, paths, prompts, tiny
from torch import nn
from transformers import DynamicCache
from versions import needs_linear

from mixkvq import MixKVQCache, compat

pytestmark = pytest.mark.skipif(
    find_spec("transformers.distributed.pipeline_parallel") is None, reason="this transformers has no pipeline stages"
)

LENGTHS, SHORT = [150, 110, 77], {"block_length": 32, "residual_length": 32, "key_group_size": 32}
LAYERS = 4
FAMILIES = {
    "llama": {},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": {"sliding_window": WINDOW},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1": {},
}
"""Growing; sliding and growing; sliding; linear and growing; both states in one layer."""


class Absent(nn.Module):
    """A module of another stage; ``wrapped``: it would return a tuple."""

    def __init__(self, *, wrapped: bool = False) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.wrapped else hidden_states


@functools.cache
def four_layers(family: str) -> Any:
    """A tiny model of this family."""
    return tiny.__wrapped__(family, num_hidden_layers=LAYERS, **FAMILIES[family])


class Stages:
    """A model, cut into two stages of two layers; and caches: one for all layers, one per stage."""

    tolerance = 0.0

    def __init__(
        self,
        family: str,
        preset: str = "default",
        *,
        known: bool = False,
        lengths: list[int] = LENGTHS,
        recording: bool = False,
    ) -> None:
        self.model = four_layers(family)
        self.parts = [self._part(0, 2), self._part(2, LAYERS)]
        given = {"config": self.model.config} if known else {}
        self.caches = [MixKVQCache(preset, **SHORT, **given) for _ in range(3)]
        if recording:
            self.apply(lambda cache: cache.activate_past_recording())
        self.mask = torch.zeros(len(lengths), 0, dtype=torch.long)
        inputs = prompts(lengths)
        self.step(inputs["input_ids"], inputs["attention_mask"])

    def _part(self, first: int, end: int) -> Any:
        part = copy.deepcopy(self.model)
        for index in range(LAYERS):
            if not first <= index < end:
                part.model.layers[index] = Absent(wrapped=self.model.config.model_type == "falcon_h1")
        if first == 0:
            for name in ("norm", "final_layernorm"):
                if hasattr(part.model, name):
                    setattr(part.model, name, Absent())
        return part

    def step(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Feed tokens to all, and compare."""
        self.mask = torch.cat([self.mask, torch.ones_like(ids) if mask is None else mask], 1)
        whole, first, second = self.caches
        want = forward(self.model, whole, ids, self.mask)
        with torch.no_grad():
            arguments = {"attention_mask": self.mask, "use_cache": True}
            hidden = self.parts[0].model(input_ids=ids, **arguments, **compat.cache_argument(first)).last_hidden_state
            got = self.parts[1](inputs_embeds=hidden, **arguments, **compat.cache_argument(second)).logits
        real = self.mask[:, -ids.shape[1] :].bool()
        assert torch.allclose(got[real], want[real], rtol=0.0, atol=self.tolerance)

    def steps(self, n: int = 2) -> None:
        for token in range(n):
            self.step(torch.full((len(self.mask), 1), 5 + token))

    def apply(self, change: Callable[[Any], Any], rows: list[int] | None = None) -> None:
        """Do the same to every cache; what is returned takes its place."""
        self.caches = [changed if (changed := change(cache)) is not None else cache for cache in self.caches]
        if rows is not None:
            self.mask = self.mask[rows]

    def crop(self, tokens: int) -> None:
        """Remove the newest tokens."""
        self.apply(lambda cache: cache.crop(-tokens))
        self.mask = self.mask[:, : self.mask.shape[1] - tokens]


def saved_and_loaded(cache: MixKVQCache) -> MixKVQCache:
    """The cache by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache.safetensors")
        return MixKVQCache.load(Path(folder) / "cache.safetensors")


OPERATIONS: dict[str, tuple[Callable[[Any], Any], list[int] | None]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "deepcopy": (copy.deepcopy, None),
    "pickle": (lambda cache: pickle.loads(pickle.dumps(cache)), None),
    "save and load": (saved_and_loaded, None),
    "fork": (lambda cache: cache.fork(2)[1], None),
    "activate_past_recording": (lambda cache: cache.activate_past_recording(), None),
}
EVERYWHERE = [(family, operation) for family in FAMILIES for operation in OPERATIONS]
for family in ("qwen3_next", "falcon_h1"):  # linear states cannot be selected or repeated: transformers has no way
    EVERYWHERE.remove((family, "batch_select_indices"))
    EVERYWHERE.remove((family, "batch_repeat_interleave"))


def window_bytes(cache: MixKVQCache) -> int:
    """Bytes that sliding layers hold from the start: the window's length, as a tensor."""
    return 8 * sum(cache.is_sliding)


@needs_linear
@pytest.mark.parametrize("known", [False, True], ids=["without a model", "with config"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_give_what_one_process_gives(family, known):
    stages = Stages(family, known=known)
    stages.steps(40)
    whole, *parts = stages.caches
    assert all(cache.get_seq_length() == whole.get_seq_length() == 190 for cache in parts)
    halves = [cache.report().layers for cache in parts]
    for index, layer in enumerate(whole.report().layers):
        held = halves[index // 2][index]
        assert (held.path, held.tokens, held.nbytes) == (layer.path, layer.tokens, layer.nbytes)
    empty = [*halves[1][:2], *halves[0][2:]]
    assert all(layer.tokens == layer.elements == 0 and layer.nbytes in (0, 8) for layer in empty)
    assert sum(cache.report().nbytes for cache in parts) == whole.report().nbytes + sum(x.nbytes for x in empty)


@needs_linear
@pytest.mark.parametrize("family, operation", EVERYWHERE)
def test_every_operation_on_stages(family, operation):
    change, rows = OPERATIONS[operation]
    stages = Stages(family, known=operation == "deepcopy")
    stages.steps()
    stages.apply(change, rows)
    stages.steps(35)


@pytest.mark.parametrize("remove", [1, 30, 100])
@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_crop_on_stages(preset, remove):
    stages = Stages("llama", preset, lengths=[150])
    stages.steps()
    stages.crop(remove)
    stages.steps(35)
    stages.apply(lambda cache: cache.crop(-1000))
    assert [cache.get_seq_length() for cache in stages.caches] == [0, 0, 0]


@needs_linear
@pytest.mark.parametrize("family", FAMILIES)
def test_rollback_on_stages(family):
    """As in assisted decoding: recorded, some tokens taken back after every call."""
    stages = Stages(family, recording=True, lengths=[150])
    stages.crop(0)
    for removed in (3, 0, 1, 5, 2):
        stages.step(torch.arange(6).view(1, 6) + 20)
        stages.crop(removed)
    assert stages.caches[2].get_seq_length() == 169


@pytest.mark.parametrize("known", [False, True], ids=["without a model", "with config"])
@pytest.mark.parametrize("family", FAMILIES)
@needs_linear
def test_stages_start_over(family, known):
    stages = Stages(family, known=known)
    stages.apply(lambda cache: cache.reset())
    for cache in stages.caches:
        assert cache.get_seq_length() == 0 and cache.report().nbytes == (window_bytes(cache) if known else 0)
    stages.mask = stages.mask[:, :0]
    inputs = prompts([90, 60], seed=4)
    stages.mask = stages.mask[:2]
    stages.step(inputs["input_ids"], inputs["attention_mask"])
    stages.steps()


@needs_linear
@pytest.mark.parametrize(
    "family, operation", [*EVERYWHERE, *((family, more) for family in FAMILIES for more in ("crop", "reset"))]
)
def test_an_operation_before_any_token(family, operation):
    """Of a cache that knows its layers and has no token in any of them."""
    more = {"crop": lambda cache: cache.crop(-1), "reset": lambda cache: cache.reset()}
    change = more[operation] if operation in more else OPERATIONS[operation][0]
    cache = MixKVQCache(config=four_layers(family).config)
    cache = changed if (changed := change(cache)) is not None else cache
    assert cache.get_seq_length() == 0 and len(cache) == LAYERS
    assert cache.report().nbytes == window_bytes(cache)
    assert cache.get_mask_sizes(7, cache.is_sliding.index(True) if True in cache.is_sliding else 0) == (7, 0)


def test_what_a_stage_is_made_of_can_be_handed_on():
    """Iteration gives None for layers without tokens, and takes it."""
    stages = Stages("llama", "lossless")
    second = stages.caches[2]
    pairs = [layer[:2] for layer in second]
    assert [keys is None and values is None for keys, values in pairs] == [True, True, False, False]
    for again in (MixKVQCache(ddp_cache_data=pairs, preset="lossless", **SHORT), DynamicCache(pairs)):
        assert again.get_seq_length(2) == 150 and again.get_seq_length(1) == 0
    assert paths(second) == ["native", "native", "packed", "packed"]
    assert not second.report().layers[0].dequantizations
    assert "(plain, 0 tokens)" in repr(second.layers[0]) and str(second.report())
    stages.tolerance = 1e-4  # plain layers, before they are packed
    stages.caches[2] = MixKVQCache("lossless", ddp_cache_data=pairs, **SHORT)
    stages.steps()
