"""What stands between transformers and the kernels costs: one decode step of one layer, kernels left out.

``python benchmarks/seam.py`` replays the lines of `LlamaAttention` that touch the cache (`update`, the look-up of the
attention function, its call) on a packed cache and subtracts the core's work: the time of the very calls that the core
got, less the time of the same calls on no query and no token (few, small heads and short blocks, so that little is
subtracted). Also, what the hook costs a model that does not use us,
and what `DynamicCache.update` costs. Microseconds per layer and step; all cases take turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from flush import machine
from transformers import DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

import mixkvq
from mixkvq import MixKVQCache, _core, ops

CORE = {ops.Layer: ("append", "attend"), _core: ("salience",)}
"""Where the core does its work in a step."""


class Replay:
    """The attention of a small Llama without the model around it: queries, keys and values of a few layers."""

    def __init__(self, options: argparse.Namespace) -> None:
        heads, group, dim = options.kv_heads, options.group, options.head_dim
        config = LlamaConfig(
            hidden_size=heads * group * dim,
            num_attention_heads=heads * group,
            num_key_value_heads=heads,
            head_dim=dim,
            num_hidden_layers=options.layers,
        )
        config._attn_implementation = "sdpa"
        self.modules = [LlamaAttention(config, index).eval() for index in range(options.layers)]
        generator = torch.Generator().manual_seed(1)

        def states(n: int) -> list[torch.Tensor]:
            sizes = heads * group, heads, heads
            return [torch.randn(1, n, h, dim, generator=generator).transpose(1, 2) for h in sizes]

        self.prompt, self.token = states(options.tokens), states(1)
        self.position = torch.zeros(1, 1, dtype=torch.int64)

    def attend(self, cache: Any, states: list[torch.Tensor]) -> list[Any]:
        """One step of all layers, as `LlamaAttention.forward` does it; what attention gave."""
        query, key, value = states
        outputs = []
        for index, module in enumerate(self.modules):
            keys, values = cache.update(key, value, index)
            function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", eager_attention_forward)
            output = function(
                module,
                query,
                keys,
                values,
                None,
                dropout=0.0,
                scaling=module.scaling,
                position_ids=self.position,
                use_cache=True,
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


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Times of all cases in microseconds per layer and step, one per round."""
    replay = Replay(options)
    cache = MixKVQCache(options.preset, block_length=32, residual_length=32, key_group_size=32)
    replay.attend(cache, replay.prompt)
    replay.attend(cache, replay.token)
    assert {layer.path for layer in cache.report().layers} == {"packed"}
    room = min(layer.store._slack for layer in cache.layers)
    assert room > options.steps + 3, f"--tokens {options.tokens} leaves {room} steps before a flush"
    plain = DynamicCache()
    replay.attend(plain, replay.prompt)
    times: dict[str, list[float]] = {}

    def clock(name: str, step: Callable[[], Any]) -> None:
        step()
        begin = time.thread_time()
        for _ in range(options.steps):
            step()
        elapsed = (time.thread_time() - begin) / (options.steps * options.layers)
        times.setdefault(name, []).append(elapsed * 1e6)

    with torch.no_grad():
        for _ in range(options.rounds):
            ours, bare, other, theirs = (copy.deepcopy(each) for each in (cache, cache, cache, plain))
            replay.attend(bare, replay.token)
            calls, _alive = core_calls(lambda cache=bare: replay.attend(cache, replay.token))
            empty = [(function, tuple(map(_without_tokens, args))) for function, args in calls]
            clock("step", lambda cache=ours: replay.attend(cache, replay.token))
            clock("core", lambda calls=calls: run(calls))
            clock("core on nothing", lambda calls=empty: run(calls))
            clock("update", lambda cache=other: replay.update(cache))
            clock("DynamicCache.update", lambda cache=theirs: replay.update(cache))
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
    rows: dict[str, tuple[str, ...]] = {  # sums of cases, with their signs
        "**the seam: step less kernels**": ("+step", "-core", "+core on nothing"),
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
