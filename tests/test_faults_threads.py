"""Threads and processes: caches of their own go on at once, one cache is refused to the second, exits are quiet."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import forward, lossless, prompts, relative_gap, tiny
from one_layer import Layer

from mixkvq import MixKVQCache, ops
from mixkvq.guard import ANOTHER_THREAD

IDS = prompts([140])["input_ids"]


def python(code: str, **environment: str) -> str:
    """What the code prints in a fresh interpreter that ends well and says nothing else."""
    here = os.path.dirname(__file__)
    begin = f"import sys; sys.path.insert(0, {here!r})\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", begin + textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# ---- a cache each --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_layers_of_their_own_at_once(preset):
    """Updates, packing, attention and crops in eight threads give what they give alone."""

    def run(seed: int) -> list[torch.Tensor]:
        block = {"block_length": 32, "residual_length": 32, "key_group_size": 32}
        layer, given = Layer(MixKVQCache(preset, **block), seed=seed), []
        for n in (90, *[1] * 40):
            mask = torch.ones(n, layer.keys.shape[2] + n, dtype=torch.bool).tril(layer.keys.shape[2])
            given.append(layer.step(n, mask.view(1, 1, *mask.shape))[0])
        layer.cache.crop(-20)
        return [*given, *layer.cache.layers[0].states]

    alone = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(run, range(8)))
    for some, others in zip(alone, at_once, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ---- one cache for two ---------------------------------------------------------------------------------------------
def in_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def filled(tokens=100):
    model, cache = tiny("llama"), lossless()
    forward(model, cache, IDS[:, :tokens])
    return model, cache


@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.self_attn"])
@pytest.mark.parametrize("tokens", [10, 100])
def test_in_the_middle_of_a_forward_pass(where, tokens):
    """What another thread tries there is refused, and the pass gives what it gives alone."""
    model, cache = filled(tokens)
    step, caught = IDS[:, tokens : tokens + 1], []
    want = forward(model, copy.deepcopy(cache), step)
    tries = {
        "pass": lambda: forward(model, cache, step),
        "crop": lambda: cache.crop(-1),
        "reorder": lambda: cache.reorder_cache(torch.tensor([0])),
        "update": lambda: cache.update(*torch.zeros(2, 1, 2, 1, 16), 0),
        "save": lambda: cache.save("/nowhere"),
    }

    def other(*_):
        hook.remove()
        for name, attempt in tries.items():
            with pytest.raises((RuntimeError, ValueError), match=r"another thread|under way"):
                in_thread(attempt)
            caught.append(name)

    hook = model.get_submodule(where).register_forward_pre_hook(other)
    got = forward(model, cache, step)
    assert caught == list(tries) and torch.equal(got, want)
    assert {layer.length for layer in cache.layers} == {tokens + 1}


def test_of_two_passes_that_have_both_begun_the_later_one_runs():
    model, cache = filled()
    want, got = forward(model, copy.deepcopy(cache), IDS[:, 101:102]), []

    def other(*_):
        hook.remove()
        got.append(in_thread(lambda: forward(model, cache, IDS[:, 101:102])))

    hook = model.model.layers[0].register_forward_pre_hook(other)  # masks are made, nothing is added yet
    with pytest.raises(RuntimeError, match=ANOTHER_THREAD.split(":")[0]):
        forward(model, cache, IDS[:, 100:101])
    assert torch.equal(got[0], want) and {layer.length for layer in cache.layers} == {101}


def test_while_the_kernel_reads(monkeypatch):
    model, cache = filled()
    want, reading, go_on = forward(model, copy.deepcopy(cache), IDS[:, 100:101]), threading.Event(), threading.Event()
    real = ops.attend

    def slowly(*args, **kwargs):
        reading.set()
        assert go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "attend", slowly)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(forward, model, cache, IDS[:, 100:101])
        assert reading.wait(60)
        layer = cache.layers[0]
        for attempt in (
            lambda: cache.update(*(torch.zeros(1, 2, 1, 16),) * 2, 0),
            lambda: layer.crop(-1),
            lambda: layer.keys,
            lambda: layer.reset(),
            lambda: cache.save("/nowhere"),
        ):
            with pytest.raises((RuntimeError, ValueError), match=r"another thread|under way"):
                attempt()
        go_on.set()
        assert torch.equal(job.result(), want)


class Turns:
    """Threads that run one at a time: at every part of the model the one that goes on is drawn anew."""

    def __init__(self, threads: int, seed: int) -> None:
        self.draw, self.left, self.changed = random.Random(seed), list(range(threads)), threading.Condition()
        self.mine, self.now = threading.local(), self.draw.randrange(threads)

    def run(self, me: int, job) -> None:
        self.mine.number = me
        with self.changed:
            self._wait()
        try:
            job(me)
        finally:
            with self.changed:
                self.left.remove(me)
                if self.left:
                    self._next()

    def pass_on(self, *_) -> None:
        with self.changed:
            self._next()
            self._wait()

    def _next(self) -> None:
        self.now = self.draw.choice(self.left)
        self.changed.notify_all()

    def _wait(self) -> None:
        assert self.changed.wait_for(lambda: self.now == self.mine.number, 300)


def made_whole(cache, length: int) -> None:
    """Back to this length as errors advise, or to nothing if only that helps."""
    try:
        if more := cache.get_seq_length() - length:
            cache.crop(-more)
    except RuntimeError as error:
        assert "cache.reset()" in str(error) or ANOTHER_THREAD in str(error)  # whose pass broke off
        cache.reset()
    assert len({layer.length for layer in cache.layers}) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_passes_that_take_turns(seed):
    """Those that are not refused give what they give alone, one after the other; of the others nothing is left."""
    model, cache = filled()
    turns, given, errors, order = Turns(3, seed), {}, [], []

    def read(me):
        for at in range(101 + 4 * me, 105 + 4 * me):
            turns.mine.at = at
            try:
                given[at] = forward(model, cache, IDS[:, at : at + 1])
            except RuntimeError as error:
                errors.append(str(error))

    *_, last = layers = model.model.layers
    parts = [model.model.embed_tokens, *layers, *(each.mlp for each in layers)]
    hooks = [each.register_forward_pre_hook(turns.pass_on) for each in parts]
    hooks.append(last.self_attn.register_forward_hook(lambda *_: order.append(turns.mine.at)))
    try:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda me: turns.run(me, read), range(3)))
    finally:
        for hook in hooks:
            hook.remove()
    assert sorted(given) == sorted(order) and len(given) + len(errors) == 12 and given and errors
    assert all("another thread" in each for each in errors)
    made_whole(cache, 100 + len(order))
    assert {layer.length for layer in cache.layers} == {100 + len(order)}
    model, alone = filled()
    for at in order:
        assert relative_gap(given[at], forward(model, alone, IDS[:, at : at + 1])) <= 1e-5
    assert relative_gap(*(forward(model, each, IDS[:, 120:]) for each in (cache, alone))) <= 1e-5


def test_many_passes_at_once():
    """As it comes: what is not refused is in the cache, and back before all of it the cache is whole."""
    model, cache = filled()
    want, given, errors = forward(model, copy.deepcopy(cache), IDS[:, 100:]), [], []

    def read(seed):
        for _ in range(15):
            try:
                given.append(forward(model, cache, IDS[:, seed : seed + 1]))
            except RuntimeError as error:
                errors.append(str(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, range(4)))
    finally:
        sys.setswitchinterval(interval)
    print(len(given), len(errors), set(errors))
    assert len(given) + len(errors) == 60
    assert all("another thread" in e or "stale" in e or "broke off" in e for e in errors)
    assert min(layer.length for layer in cache.layers) >= 100 + len(given)
    made_whole(cache, 100)
    if not cache.get_seq_length():
        forward(model, cache, IDS[:, :100])
    assert {layer.length for layer in cache.layers} == {100}
    assert relative_gap(forward(model, cache, IDS[:, 100:]), want) <= 1e-5


def test_one_thread_after_the_other():
    """A pool may give every step to another thread."""
    model, cache = filled()
    want = copy.deepcopy(cache)
    for at in range(100, 110):
        got = in_thread(lambda at=at: forward(model, cache, IDS[:, at : at + 1]))
        assert torch.equal(got, forward(model, want, IDS[:, at : at + 1]))


# ---- fork ----------------------------------------------------------------------------------------------------------
FORKED = """
import os, signal, torch
from models import forward, lossless, prompts, tiny
from one_layer import Layer, packed_layer
from mixkvq import MixKVQCache, ops

torch.set_num_threads({before})
layer = packed_layer()
store = layer.cache.layers[0].store
query = torch.randn(1, 4, 700, 16)
want = ops.attend(store.core(), query)
torch.set_num_threads(4)
torch.ones(4_000_000).sin()
ends, begin = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(100)
    got = ops.attend(store.core(), query)
    torch.set_num_threads(1)  # torch's own operators would wait for ever
    assert torch.equal(got, want)
    packed_layer()
    model, cache, ids = tiny("llama"), lossless(), prompts([140])["input_ids"]
    forward(model, cache, ids[:, :100])
    forward(model, cache, ids[:, 100:])
    os.write(begin, b"done")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(os.read(ends, 9).decode(), torch.equal(ops.attend(store.core(), query), want))
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [4, 1])
def test_a_forked_process_goes_on(before):
    """And so does its parent; the child has none of the threads of the pool, which torch started if not the kernels."""
    assert python(FORKED.format(before=before), OMP_NUM_THREADS="4").split() == ["done", "True"]


# ---- the end of the interpreter ------------------------------------------------------------------------------------
ENDS = {
    "in globals": """
        cache = lossless()
        forward(model, cache, ids)
        forks = cache.fork(2)
        keys = cache.layers[0].keys
        pair = cache.update(*torch.randn(2, 1, 2, 1, 16), 0)
    """,
    "in a cycle": """
        cache = lossless()
        forward(model, cache, ids)
        cache.me = cache, model
        model.cache = cache
    """,
    "in a thread that ends later": """
        def decode():
            cache = lossless()
            for at in range(0, 140, 5):
                forward(model, cache, ids[:, at : at + 5])
        threading.Thread(target=decode).start()
    """,
    "in daemon threads that never end": """
        # in the kernels: torch's own operators abort the process there (CPython 3.11), with any cache
        from test_bind import _core, attend, queries, window
        begun = threading.Barrier(3)
        def read():
            begun.wait()
            while True:
                attend(_core.Layer(**window()), queries(50))
        for _ in range(2):
            threading.Thread(target=read, daemon=True).start()
        begun.wait()
        time.sleep(0.3)
    """,
    "in a hook at exit": """
        import atexit
        cache = lossless()
        forward(model, cache, ids[:, :100])
        atexit.register(lambda: forward(model, cache, ids[:, 100:]))
    """,
    "attached": """
        import mixkvq
        handle = mixkvq.attach(model)
        model.generate(ids, max_new_tokens=3)
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ENDS)
def test_the_end_is_quiet(where):
    begin = """
        import threading, time, torch
        from models import forward, lossless, prompts, tiny
        model, ids = tiny("llama"), prompts([140])["input_ids"]
    """
    assert python(textwrap.dedent(begin) + textwrap.dedent(ENDS[where])) == ""
