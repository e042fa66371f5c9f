"""Threads and processes: caches of their own go on at once, one cache is refused to the second, exits are quiet."""

from __future__ import annotations

import copy
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from models import forward, lossless, prompts, relative_gap, tiny
from one_layer import Layer
from versions import needs_linear

from mixkvq import MixKVQCache, ops, tensorfile
from mixkvq.guard import ANOTHER_THREAD
from mixkvq.layer import MixKVQLayer
from mixkvq.store import PackedStore

IDS = prompts([600])["input_ids"]
IN_USE = ANOTHER_THREAD.split(":")[0]


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
        "fork": lambda: cache.fork(1),
        "copy": lambda: copy.deepcopy(cache),
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
    with pytest.raises(RuntimeError, match=IN_USE):
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
            lambda: cache.fork(1),
            lambda: copy.deepcopy(cache),
            lambda: pickle.dumps(cache),
        ):
            with pytest.raises((RuntimeError, ValueError), match=r"another thread|under way"):
                attempt()
        go_on.set()
        assert torch.equal(job.result(), want)


# ---- all of a cache ------------------------------------------------------------------------------------------------
def made(how, cache, folder):
    """A copy."""
    if how == "save":
        cache.save(folder / "c")
        return MixKVQCache.load(folder / "c")
    return cache.fork(1)[0] if how == "fork" else copy.deepcopy(cache)


def same(one, other):
    """Layers of one length with the same keys and values."""
    assert [layer.length for layer in one.layers] == [layer.length for layer in other.layers]
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(one.layers, other.layers, strict=True) for name in KV]
    return all(torch.equal(a, b) for a, b in pairs)


KV = ("keys", "values")
INSIDE = {
    "save": (tensorfile, "_bytes_of"),
    "fork": (MixKVQLayer, "__getstate__"),
    "deepcopy": (MixKVQLayer, "__getstate__"),
}


@pytest.mark.parametrize("how", ["save", "fork", "deepcopy"])
@pytest.mark.parametrize("tokens, n", [(100, 1), (95, 3), (100, 60), (20, 60)])
def test_a_pass_that_begins_meanwhile_is_refused(how, tokens, n, tmp_path, monkeypatch):
    """In the middle of writing or copying, before every part; afterwards it runs as ever."""
    model, cache = filled(tokens)
    whole, step, errors = copy.deepcopy(cache), IDS[:, tokens : tokens + n], []
    want, (owner, name) = forward(model, copy.deepcopy(cache), step), INSIDE[how]
    real = getattr(owner, name)

    def other(part):
        try:
            in_thread(lambda: forward(model, cache, step))
        except RuntimeError as error:
            errors.append(str(error))
        return real(part)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, other)
        got = made(how, cache, tmp_path)
    assert len(errors) >= 2 and all(IN_USE in error for error in errors)
    assert cache.half_done() is None and same(got, whole) and same(cache, whole)
    assert torch.equal(in_thread(lambda: forward(model, cache, step)), want)


@pytest.mark.parametrize("how", ["save", "fork", "deepcopy"])
@pytest.mark.parametrize("meanwhile", [True, False])
def test_a_pass_that_has_its_masks(meanwhile, how, tmp_path, monkeypatch):
    """Its first update is refused, if it comes in the middle; afterwards it goes on."""
    model, cache = filled()
    whole, want = copy.deepcopy(cache), forward(model, cache.fork(1)[0], IDS[:, 100:101])
    ready, go_on, (owner, name) = threading.Event(), threading.Event(), INSIDE[how]
    real = getattr(owner, name)

    def wait(*_):
        hook.remove()
        ready.set()
        assert go_on.wait(60)

    def other(part):
        if meanwhile:
            go_on.set()
            job.exception(60)
        return real(part)

    hook = model.model.layers[0].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool, monkeypatch.context() as patch:
        job = pool.submit(forward, model, cache, IDS[:, 100:101])
        assert ready.wait(60)
        patch.setattr(owner, name, other)
        assert same(made(how, cache, tmp_path), whole) and same(cache, whole)
        go_on.set()
        if meanwhile:
            with pytest.raises(RuntimeError, match=IN_USE):
                job.result()
            job = pool.submit(forward, model, cache, IDS[:, 100:101])
        assert torch.equal(job.result(), want)


@pytest.mark.parametrize("how", ["save", "fork", "deepcopy"])
def test_beside_a_thread_that_decodes(how, tmp_path):
    """As it comes: what is not refused is a state between two passes."""
    model, cache = filled(60)
    full, stop, got = lossless(), threading.Event(), []
    forward(model, full, IDS)

    def decode():
        at = 60
        while not stop.is_set() and at < 600:
            try:
                forward(model, cache, IDS[:, at : at + 1])
                at += 1
            except RuntimeError:
                back(at)

    def back(length):
        while cache.get_seq_length() > length:
            try:
                cache.crop(length - cache.get_seq_length())
            except RuntimeError as error:
                assert IN_USE in str(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(decode)
            while not job.done() and len(got) < 12:
                try:
                    got.append(made(how, cache, tmp_path))
                except (RuntimeError, ValueError) as error:
                    assert IN_USE in str(error) or "under way" in str(error)
            stop.set()
            job.result()
    finally:
        sys.setswitchinterval(interval)
    assert got
    for each in got:
        (length,) = {layer.length for layer in each.layers}
        assert each.half_done() is None and 60 <= length <= 600
        for ours, all_of_it in zip(each.layers, full.layers, strict=True):
            for name in KV:
                assert relative_gap(getattr(ours, name), getattr(all_of_it, name)[:, :, :length]) <= 1e-5


@pytest.mark.parametrize("name, n", [("append", 3), ("extend", 1)])
def test_what_interrupts_a_change_in_its_own_thread_gets_no_copy(name, n, monkeypatch):
    """A signal handler, say."""
    model, cache = filled()
    forward(model, cache, IDS[:, 100:101])
    step, caught, real = IDS[:, 101 : 101 + n], [], getattr(PackedStore, name)
    want = forward(model, copy.deepcopy(cache), step)

    def interrupted(self, *args):
        for attempt in (lambda: cache.save("/nowhere"), lambda: cache.fork(1), lambda: copy.deepcopy(cache)):
            with pytest.raises((RuntimeError, ValueError), match=r"in use|under way"):
                attempt()
            caught.append(attempt)
        return real(self, *args)

    monkeypatch.setattr(PackedStore, name, interrupted)
    assert torch.equal(forward(model, cache, step), want)
    assert len(caught) == 6


@pytest.mark.parametrize("family", ["gemma3", pytest.param("qwen3_next", marks=needs_linear)])
def test_layers_of_transformers_are_not_copied_while_they_change(family, monkeypatch, tmp_path):
    model, cache = tiny(family), MixKVQCache(config=tiny(family).config)
    forward(model, cache, IDS[:, :100])
    caught = []
    if family == "gemma3":
        owner = type(next(layer for layer in cache.layers if not isinstance(layer, MixKVQLayer)))
        name = "update"
    else:
        owner, name = transformers.cache_utils.Cache, "update_recurrent_state"
    real, want = getattr(owner, name), forward(model, copy.deepcopy(cache), IDS[:, 100:101])

    def other(*args, **kwargs):
        result = real(*args, **kwargs)
        for how in ("save", "fork", "deepcopy"):
            with pytest.raises((RuntimeError, ValueError), match=rf"{IN_USE}|under way"):
                in_thread(lambda how=how: made(how, cache, tmp_path))
            caught.append(how)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, other)
        assert torch.equal(forward(model, cache, IDS[:, 100:101]), want)
    assert len(caught) >= 3 and not list(tmp_path.iterdir())


def test_a_copy_of_what_is_half_changed_says_so(monkeypatch):
    """While the window moves up: by another thread that is refused; for the thread itself the copy must be emptied."""
    model, cache = filled(95)
    real, copies, refused = PackedStore._move_window, [], []

    def other(self, *args):
        real(self, *args)
        if not copies:
            copies.append(pickle.loads(pickle.dumps(cache.layers[0])))
            for how in (copy.deepcopy, pickle.dumps):
                with pytest.raises(RuntimeError, match=IN_USE):
                    in_thread(lambda how=how: how(cache))
                refused.append(how)

    monkeypatch.setattr(PackedStore, "_move_window", other)
    forward(model, cache, IDS[:, 95:98])
    assert len(refused) == 2 and cache.layers[0].store.torn is False
    (layer,) = copies
    with pytest.raises(RuntimeError, match=r"half changed.*cache.reset\(\)"):
        layer.crop(-1)
    layer.reset()
    assert layer.update(*torch.zeros(2, 1, 2, 1, 16))[0].shape[2] == 1


@pytest.mark.parametrize("broken", [False, True])
def test_reset_by_another_thread_empties_all_or_nothing(broken, monkeypatch):
    """Of four layers the third is being read."""
    model = tiny("llama", num_hidden_layers=4)
    cache, step, at = lossless(), IDS[:, 100:101], []
    forward(model, cache, IDS[:, :100])
    want, real = forward(model, copy.deepcopy(cache), step), ops.attend
    reading, go_on = threading.Event(), threading.Event()

    def slowly(*args, **kwargs):
        at.append(1)
        if len(at) == 3:
            reading.set()
            assert go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "attend", slowly)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(forward, model, cache, step)
        assert reading.wait(60)
        if broken:  # stays so
            cache.layers[0].busy = -1
        with pytest.raises(RuntimeError, match=f"layer 2 .*{IN_USE}"):
            cache.reset()
        assert [layer.length for layer in cache.layers] == [101, 101, 101, 100]
        assert [layer.busy != 0 for layer in cache.layers] == [broken, False, True, False] and not cache.busy
        go_on.set()
        assert torch.equal(job.result(), want)
    assert [layer.length for layer in cache.layers] == [101] * 4
    if broken:
        with pytest.raises(RuntimeError, match=r"layer 0 .*half changed.*cache.reset\(\)"):
            forward(model, cache, step)
        cache.reset()
    else:
        cache.crop(-101)
    assert relative_gap(forward(model, cache, IDS[:, :101])[:, -1:], want) <= 1e-5


def test_a_pass_does_not_go_on_in_a_cache_that_was_emptied():
    """Between two layers nobody holds it, and whether the pass will go on cannot be told."""
    model, cache = tiny("llama", num_hidden_layers=4), lossless()
    forward(model, cache, IDS[:, :100])

    def other(*_):
        hook.remove()
        in_thread(cache.reset)

    hook = model.model.layers[2].register_forward_pre_hook(other)
    with pytest.raises(RuntimeError, match=IN_USE):
        forward(model, cache, IDS[:, 100:140])
    assert not cache.layers and cache.report().nbytes == 0
    assert torch.equal(forward(model, cache, IDS[:, :100]), forward(model, lossless(), IDS[:, :100]))


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
    assert relative_gap(*(forward(model, each, IDS[:, 120:140]) for each in (cache, alone))) <= 1e-5


def test_many_passes_at_once():
    """As it comes: what is not refused is in the cache, and back before all of it the cache is whole."""
    model, cache = filled()
    want, given, errors = forward(model, copy.deepcopy(cache), IDS[:, 100:140]), [], []

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
    assert relative_gap(forward(model, cache, IDS[:, 100:140]), want) <= 1e-5


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


LEFT = """
import os, signal, threading, warnings, torch
from models import forward, lossless, prompts, tiny
from mixkvq import ops
from mixkvq.store import PackedStore

warnings.simplefilter("ignore")  # that a process with threads forks
model, ids = tiny("llama"), prompts([140])["input_ids"]
want = forward(model, lossless(), ids[:, :120])

def in_child(thread):
    cache.layers[0].reset()  # whoever is torn, this one is not
    for attempt in (lambda: forward(model, cache, ids[:, :1]), lambda: cache.crop(-1), lambda: cache.fork(1)):
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            assert "cache.reset()" in str(error) and "thread" not in str(error), error
        else:
            raise AssertionError(attempt)
    cache.reset()
    assert torch.equal(forward(model, cache, ids[:, :120]), want)
    os.write(begin, b"%d" % (threading.get_ident() == worker.ident))

for owner, name, n in ((ops, "attend", 1), (PackedStore, "append", 3)):
    for thread in (False, True):
        cache, calls, inside, go_on = lossless(), [], threading.Event(), threading.Event()
        forward(model, cache, ids[:, :100])
        real = getattr(owner, name)

        def slowly(*args, **kwargs):
            if threading.current_thread() is worker:
                calls.append(1)
                if len(calls) == 2:  # of the last layer
                    inside.set()
                    assert go_on.wait(60)
            return real(*args, **kwargs)

        setattr(owner, name, slowly)
        worker = threading.Thread(target=forward, args=(model, cache, ids[:, 100 : 100 + n]))
        worker.start()
        assert inside.wait(60)
        ends, begin = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            if thread:  # it may well get the identity of the one that is not there
                new = threading.Thread(target=in_child, args=(thread,))
                new.start()
                new.join()
            else:
                in_child(thread)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        go_on.set()
        worker.join()
        setattr(owner, name, real)
        print(os.read(ends, 9).decode(), [layer.length - n for layer in cache.layers])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_told_of_a_pass_that_is_not_there():
    """That of another thread, on the short path or not; in the child this thread goes on, or a new one."""
    told = [line.split(maxsplit=1) for line in python(LEFT).splitlines()]
    assert [lengths for _, lengths in told] == ["[100, 100]"] * 4
    assert [same for same, _ in told][::2] == ["0", "0"] and {same for same, _ in told} <= {"0", "1"}


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
