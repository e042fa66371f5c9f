"""The other calls: packing of a prompt and of a step, unpacking, appending, query statistics.

Microseconds per call and per block of 128 tokens of one KV head, and the bytes of keys, values or queries that go in
(unpacking: come out) over time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mixkvq import MixKVQConfig, ops
from mixkvq.states import codec_of

from . import data
from .options import parse
from .shapes import PRESETS
from .timing import Case, graphed, take_turns


@dataclass(frozen=True)
class Sizes:
    """How much goes into every call."""

    dim: int = 128
    prompt_rows: int = 4
    """Rows of a prompt of which `prompt_blocks` blocks are packed at once."""
    prompt_blocks: int = 64
    step_rows: int = 16
    """Rows of a step in which every head packs one block."""
    unpack_tokens: int = 16384
    group: int = 4
    """Query heads per KV head."""


TINY = Sizes(64, 1, 2, 2, 300, 2)


@dataclass(frozen=True)
class Verb:
    """A call to be timed.

    Attributes
    ----------
    case : Case
    where, facts : dict
    nbytes : int
        Of keys and values, or queries.
    blocks : int
        Head blocks; 0 where there are none.
    """

    case: Case
    where: dict[str, Any]
    facts: dict[str, Any]
    nbytes: int
    blocks: int = 0


def packing(preset: str, rows: int, blocks: int, dim: int, device: str, name: str) -> Verb:
    """`ops.pack` of this many blocks of every head."""
    config = MixKVQConfig.preset(preset)
    k, v = data.states(rows, blocks * config.block_length, dim, device)
    codec = codec_of(config, k, v)
    first = torch.zeros(rows, dtype=torch.int64, device=device)
    counts = torch.full_like(first, blocks)
    weights = None
    if config.salience != "none":
        weights = data.queries(rows, 1, dim, device, dtype=torch.float32)[:, :, 0].abs().contiguous()
    mu = has_mu = None
    if codec.key_reference:
        mu = torch.zeros(rows, data.HEADS, dim, dtype=torch.float16, device=device)
        has_mu = torch.zeros(rows, data.HEADS, dtype=torch.uint8, device=device)

    def call() -> None:
        ops.pack(codec, k, v, first, counts, blocks, weights, mu, has_mu)

    where = {"head_dim": dim, "batch": rows, "heads": data.HEADS, "blocks": blocks}
    many = rows * data.HEADS * blocks
    return Verb(Case(f"{name}, {preset}", call, most=32), where, {"preset": preset}, k.nbytes + v.nbytes, many)


def unpacking(preset: str, sizes: Sizes, device: str) -> Verb:
    """`ops.unpack` of a whole history."""
    k, v = data.states(1, sizes.unpack_tokens, sizes.dim, device)
    packed = data.Packed.of(preset, k, v)
    store = packed.store
    handle, first = store.core(), torch.zeros(1, dtype=torch.int64, device=device)
    blocks = int(store.blocks[0]) * data.HEADS
    nbytes = 2 * blocks * store.config.block_length * sizes.dim * k.element_size()
    where = {"head_dim": sizes.dim, "batch": 1, "heads": data.HEADS, "tokens": sizes.unpack_tokens}
    case = Case(f"unpack, {preset}", lambda: ops.unpack(handle, k, v, first))
    return Verb(case, where, {"preset": preset}, nbytes, blocks)


def appending(sizes: Sizes, device: str) -> Verb:
    """`ops.append` of one token to every row."""
    room, rows = 512, sizes.step_rows
    k, v = (torch.zeros(rows, data.HEADS, room, sizes.dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    new = data.states(rows, 1, sizes.dim, device)
    exact = torch.zeros(rows, dtype=torch.int64, device=device)
    place, none = exact.new_zeros(rows, data.HEADS, 0), torch.zeros_like(exact)
    handle = ops.layer(k, v, exact, None, 0, [], place, none)
    where = {"head_dim": sizes.dim, "batch": rows, "heads": data.HEADS}
    case = Case("append", lambda: ops.append(handle, *new), before=lambda: exact.zero_(), most=room // 2)
    return Verb(case, where, {}, 2 * new[0].nbytes)


def observing(n: int, rows: int, sizes: Sizes, device: str, name: str) -> Verb:
    """`ops.salience_` of n queries of every row and head."""
    q = data.queries(rows, sizes.group, sizes.dim, device, n=n)
    total = torch.zeros(rows, data.HEADS, sizes.dim, dtype=torch.float64, device=device)
    where = {"head_dim": sizes.dim, "batch": rows, "heads": data.HEADS, "group": sizes.group, "queries": n}
    return Verb(Case(name, lambda: ops.salience_(total, q, data.HEADS, 2)), where, {}, q.nbytes)


def verbs(sizes: Sizes, device: str) -> Iterator[Verb]:
    """Everything to be timed."""
    for preset in PRESETS:
        yield packing(preset, sizes.prompt_rows, sizes.prompt_blocks, sizes.dim, device, "pack, prompt")
        yield packing(preset, sizes.step_rows, 1, sizes.dim, device, "pack, step")
    for preset in ("default", "kivi-2"):
        yield unpacking(preset, sizes, device)
    yield appending(sizes, device)
    yield observing(1, sizes.step_rows, sizes, device, "salience, step")
    yield observing(64 * sizes.prompt_blocks, sizes.prompt_rows, sizes, device, "salience, prompt")


def main(arguments: list[str] | None = None) -> None:
    """Time each call, alone and replayed from a graph."""
    options = parse(__doc__, arguments)
    found = {}
    for verb in verbs(TINY if options.rehearse else Sizes(), options.device):
        if options.deadline.passed(0 if options.rehearse else 2):
            print(f"left out for lack of time: {verb.case.name}", flush=True)
            continue
        replay, why = graphed(verb.case.call, options.device)
        cases = [verb.case]
        if replay is not None:
            cases.append(Case(f"{verb.case.name}, graph", replay, verb.case.before, verb.case.most))
        take_turns(cases, options.device, options.rounds)
        best = min(case.median for case in cases)
        values: dict[str, float | None] = {
            "us": verb.case.median * 1e6,
            "us_graph": cases[1].median * 1e6 if replay is not None else None,
            "us_per_head_block": best * 1e6 / verb.blocks if verb.blocks else None,
            "gbps": verb.nbytes / best / 1e9,
            "bytes": verb.nbytes,
        }
        options.log.add("verbs", verb.case.name, verb.where, values, **verb.facts, graph=why or "replayed")
        found[verb.case.name] = values
        block = f"{values['us_per_head_block']:9.3f} us / head block" if verb.blocks else ""
        print(f"{verb.case.name:28} {best * 1e6:10.1f} us {values['gbps']:8.1f} GB/s {block}", flush=True)
    prompt = found.get("pack, prompt, default")
    about = f"{prompt['us_per_head_block']:.2f} us per head block of a prompt" if prompt else "not measured"
    print(f"== {len(found)} calls timed; pack, default: {about}")


if __name__ == "__main__":
    main()
