"""What stands between transformers and the kernels costs: one decode step of one layer, kernels left out.

``python benchmarks/seam.py`` replays the lines of `LlamaAttention` that touch the cache (`update`, the look-up of the
attention function, its call) on a packed cache and subtracts the core's work: the time of the very calls that the core
got, less the time of the same calls on no query and no token (few, small heads and short blocks, so that little is
subtracted). The same for eager attention with a mask, for a padded batch and for learned sinks. Also, what the hook
costs a model that does not use us, and what `DynamicCache.update` costs. Microseconds per layer and step; all cases
take turns.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flush import machine
from transformers import DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

import mixkvq
from mixkvq import MixKVQCache, _core, ops

CORE = {ops.Layer: ("append", "attend"), _core: ("salience",)}
"""Where the core does its work in a step."""


@dataclass(frozen=True)
class Kind:
    """How a model calls attention.

    Attributes
    ----------
    implementation : str
        "eager": every call has an additive mask.
    padding : int
        Columns that a bool mask hides from the second of two rows; 0: one row, no mask but in the prompt.
    sinks : bool
        As gpt-oss.
    """

    implementation: str = "sdpa"
    padding: int = 0
    sinks: bool = False


KINDS = {
    "": Kind(),
    "eager, masked: ": Kind("eager"),
    "sdpa, padded batch of 2: ": Kind(padding=32),
    "eager, masked, sinks: ": Kind("eager", sinks=True),
}


class Replay:
    """The attention of a small Llama without the model around it: queries, keys and values of a few layers."""

    def __init__(self, options: argparse.Namespace, kind: Kind) -> None:
        heads, group, dim, tokens = options.kv_heads, options.group, options.head_dim, options.tokens
        config = LlamaConfig(
            hidden_size=heads * group * dim,
            num_attention_heads=heads * group,
            num_key_value_heads=heads,
            head_dim=dim,
            num_hidden_layers=options.layers,
        )
        config._attn_implementation = self.implementation = kind.implementation
        self.modules = [LlamaAttention(config, index).eval() for index in range(options.layers)]
        self.eager = (modeling_gpt_oss if kind.sinks else modeling_llama).eager_attention_forward
        generator = torch.Generator().manual_seed(1)
        batch = 2 if kind.padding else 1

        def states(n: int) -> list[torch.Tensor]:
            sizes = heads * group, heads, heads
            return [torch.randn(batch, n, h, dim, generator=generator).transpose(1, 2) for h in sizes]

        self.prompt, self.token = states(tokens), states(1)
        self.position = torch.zeros(1, 1, dtype=torch.int64)
        self.arguments: list[dict[str, Any]] = [{} for _ in self.modules]
        if kind.sinks:
            for module, arguments in zip(self.modules, self.arguments, strict=True):
                module.sinks = torch.nn.Parameter(torch.randn(heads * group, generator=generator))
                arguments["s_aux"] = module.sinks
        seen = torch.ones(batch, 1, tokens, tokens + 2 * options.steps, dtype=torch.bool).tril()
        seen[1:, ..., : kind.padding] = False
        last = seen[:, :, -1:] | (torch.arange(seen.shape[3]) >= tokens)
        if kind.implementation == "eager":
            seen, last = (torch.where(mask, 0.0, torch.finfo(torch.float32).min) for mask in (seen, last))
        self.masks = seen[..., :tokens], last if kind.padding or kind.implementation == "eager" else None

    def attend(self, cache: Any, states: list[torch.Tensor]) -> list[Any]:
        """One step of all layers, as `LlamaAttention.forward` does it; what attention gave."""
        query, key, value = states
        mask = self.masks[states is self.token]
        mask = None if mask is None else mask[:]  # a model makes one for every step
        outputs = []
        for index, module in enumerate(self.modules):
            keys, values = cache.update(key, value, index)
            function = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, self.eager)
            output = function(
                module,
                query,
                keys,
                values,
                mask,
                dropout=0.0,
                scaling=module.scaling,
                position_ids=self.position,
                use_cache=True,
                **self.arguments[index],
            )
            outputs.append(output)
        return outputs

    def update(self, cache: Any) -> None:
        """The updates of a step alone."""
        _, key, value = self.token
        for index in range(len(self.modules)):
            cache.update(key, value, index)

    def look_up(self) -> None:
        """A model that does not use us: the look-up of all layers, and calls of a function that does nothing."""
        query, key, value = self.token
        for module in self.modules:
            function = ALL_ATTENTION_FUNCTIONS.get_interface("eager", _nothing)
            function(module, query, key, value, None, dropout=0.0, scaling=0.125, position_ids=None, use_cache=True)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def core_calls(step: Callable[[], Any]) -> tuple[list[tuple[Callable[..., Any], tuple[Any, ...]]], Any]:
    """The calls that the core gets in a step, to be repeated; and what must live as long as they do."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def recorder(function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            calls.append((function, args))
            return function(*args)

        return record

    kept = [(owner, name, owner.__dict__.get(name)) for owner, names in CORE.items() for name in names]
    for owner, name, _ in kept:
        setattr(owner, name, recorder(getattr(owner, name)))
    try:
        result = step()
    finally:
        for owner, name, original in kept:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
    return calls, result


def _without_tokens(argument: Any) -> Any:
    """A view [B, H, n, D] with n = 0; anything else as it is."""
    if not isinstance(argument, tuple) or len(argument[2]) != 4:
        return argument
    address, dtype, (batch, heads, _, dim), strides = argument
    return address, dtype, (batch, heads, 0, dim), strides


def run(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
    """Repeat recorded calls."""
    for function, args in calls:
        function(*args)


def filled(options: argparse.Namespace, replay: Replay) -> MixKVQCache:
    """A packed cache with room for all steps of a round."""
    cache = MixKVQCache(options.preset, block_length=32, residual_length=32, key_group_size=32)
    replay.attend(cache, replay.prompt)
    replay.attend(cache, replay.token)
    assert {layer.path for layer in cache.report().layers} == {"packed"}
    room = min(layer.store._slack for layer in cache.layers)
    assert room > options.steps + 3, f"--tokens {options.tokens} leaves {room} steps before a flush"
    return cache


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Times of all cases in microseconds per layer and step, one per round."""
    replays = {name: Replay(options, kind) for name, kind in KINDS.items()}
    caches = {name: filled(options, replay) for name, replay in replays.items()}
    replay, plain = replays[""], DynamicCache()
    replay.attend(plain, replay.prompt)
    times: dict[str, list[float]] = {}

    def clock(name: str, step: Callable[[], Any]) -> None:
        step()
        begin = time.thread_time()
        for _ in range(options.steps):
            step()
        elapsed = (time.thread_time() - begin) / (options.steps * options.layers)
        times.setdefault(name, []).append(elapsed * 1e6)

    for _ in range(options.rounds):
        for name, each in replays.items():
            ours, bare, other = (copy.deepcopy(caches[name]) for _ in range(3))
            each.attend(bare, each.token)
            calls, _alive = core_calls(functools.partial(each.attend, bare, each.token))
            empty = [(function, tuple(map(_without_tokens, args))) for function, args in calls]
            clock(name + "step", functools.partial(each.attend, ours, each.token))
            clock(name + "core", functools.partial(run, calls))
            clock(name + "core on nothing", functools.partial(run, empty))
            clock(name + "update", functools.partial(each.update, other))
            assert not any(layer.dequantizations for layer in ours.layers)
        clock("DynamicCache.update", functools.partial(replay.update, copy.deepcopy(plain)))
        clock("look-up, hooked", replay.look_up)
        mixkvq.uninstall()
        clock("look-up", replay.look_up)
        mixkvq.install()
    return times


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--group", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=80)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = measure(options)
    seam = "+{}step", "-{}core", "+{}core on nothing"
    rows: dict[str, tuple[str, ...]] = {  # sums of cases, with their signs
        **{f"**{name}the seam: step less kernels**": tuple(term.format(name) for term in seam) for name in KINDS},
        "step, kernels included": ("+step",),
        "kernels": ("+core", "-core on nothing"),
        "in the seam: `update`, copying the token included": ("+update",),
        "in the seam: look-up, checks, call": ("+step", "-core", "+core on nothing", "-update"),
        "in the seam: the core's reading of arguments": ("+core on nothing",),
        "for comparison: `DynamicCache.update`": ("+DynamicCache.update",),
        "look-up and call of nothing, no hook": ("+look-up",),
        "look-up and call of nothing, hook installed": ("+look-up, hooked",),
        "**what the hook costs a model that does not use us**": ("+look-up, hooked", "-look-up"),
    }
    print(
        f"{machine()}, one thread; `{options.preset}`, {options.layers} layers, {options.kv_heads} KV heads, "
        f"group {options.group}, head_dim {options.head_dim}, {options.tokens} tokens"
    )
    print(f"microseconds per layer and step: of the best / of the median round of {options.rounds}")
    for name, terms in rows.items():
        best, median = (
            sum((1 if term[0] == "+" else -1) * of(times[term[1:]]) for term in terms)
            for of in (min, statistics.median)
        )
        print(f"| {name} | {best:.2f} / {median:.2f} |")


if __name__ == "__main__":
    main()
