"""A forward pass that breaks off, by an error or Ctrl-C: it is undone, or the cache says that it must be emptied."""

from __future__ import annotations

import copy
import dis
import functools
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from models import forward, lossless, paths, prompts, relative_gap, tiny

import mixkvq
from mixkvq import MixKVQCache
from mixkvq.compat import VERSION

OURS = str(Path(mixkvq.__file__).parent)
IDS = prompts([140])["input_ids"]
PASSES = {"prompt": (100,), "step": (100, 1), "step that packs": (95, 1), "chunk": (60, 40)}


class Stop(Exception):
    """What a model raises."""


@contextmanager
def stopping_at(model: Any, layer: int, error: type[BaseException] = Stop, part: str = "self_attn") -> Iterator[None]:
    """A part of this layer raises."""

    def stop(*_: Any) -> None:
        raise error

    module = model.model.layers[layer].get_submodule(part)
    hook = module.register_forward_hook(stop) if part == "self_attn" else module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def begun(name: str, model: Any, make: Callable[[], Any] = lossless) -> tuple[Any, int, int]:
    """(cache, its length, tokens of the pass)."""
    *done, n = PASSES[name]
    cache, at = make(), 0
    for size in done:
        forward(model, cache, IDS[:, at : at + size])
        at += size
    return cache, at, n


def go_on(model: Any, cache: Any, at: int, n: int) -> list[torch.Tensor]:
    return [forward(model, cache, IDS[:, begin:end]) for begin, end in ((at, at + n), (at + n, at + n + 15))]


def back_to(cache: Any, length: int) -> None:
    if more := cache.get_seq_length() - length:
        cache.crop(-more)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(relative_gap(a, b) <= 1e-5 for a, b in zip(got, want, strict=True))


# ---- at the n-th layer ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
@pytest.mark.parametrize("name", PASSES)
def test_cropped_to_the_length_before_a_pass_can_be_repeated(name, part, error):
    model = tiny("llama", num_hidden_layers=4)
    want = go_on(model, *begun(name, model))
    for layer in range(4):
        cache, at, n = begun(name, model)
        with stopping_at(model, layer, error, part), pytest.raises(error):
            forward(model, cache, IDS[:, at : at + n])
        assert cache.get_seq_length() == at + n
        back_to(cache, at)
        assert {each.length for each in cache.layers} == {at}
        assert same(go_on(model, cache, at, n), want)
        assert set(paths(cache)) == {"packed"}


@pytest.mark.parametrize("name", ["step", "step that packs", "chunk"])
def test_without_that_the_next_pass_is_refused_and_told_what_to_do(name):
    model = tiny("llama", num_hidden_layers=4)
    want = go_on(model, *begun(name, model))
    cache, at, n = begun(name, model)
    with stopping_at(model, 2), pytest.raises(Stop):
        forward(model, cache, IDS[:, at : at + n])
    remedy = rf"broke off: layer 0 has {at + n} tokens, layer 3 has {at}. cache.crop\(-{n}\) takes back what it added"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=remedy if VERSION >= (5, 14) else "broke off"):
            forward(model, cache, IDS[:, at : at + n])
    with pytest.raises(ValueError, match="cannot be saved: a forward pass broke off"):
        cache.save("/nowhere")
    other = copy.deepcopy(cache)
    back_to(cache, at)
    assert same(go_on(model, cache, at, n), want)
    other.reset()
    assert same([forward(model, other, IDS[:, : at + n])[:, -n:], *go_on(model, other, at + n, 15)[:1]], want)


def test_a_first_pass_that_broke_off_is_noticed_where_the_second_does():
    model, cache = tiny("llama", num_hidden_layers=4), lossless()
    with stopping_at(model, 1), pytest.raises(Stop):
        forward(model, cache, IDS[:, :50])
    with pytest.raises(RuntimeError, match=r"broke off, its first: layer 2 has no tokens.*cache.reset\(\)"):
        forward(model, cache, IDS[:, :50])
    cache.reset()
    assert same(go_on(model, cache, 0, 50), go_on(model, lossless(), 0, 50))


@pytest.mark.parametrize("family", ["gemma3", "qwen3_next"])
def test_layers_that_cannot_go_back_leave_the_others_where_they_are(family):
    """A sliding window that is full, a recurrent state."""
    model, cache, at = tiny(family), MixKVQCache(config=tiny(family).config), 100
    last = len(model.model.layers) - 1
    for n in (at - 1, 1):
        forward(model, cache, IDS[:, :n] if n > 1 else IDS[:, at - 1 : at])
    with stopping_at(model, last, part="mlp"):
        for step in range(2):
            error = Stop if step == 0 else (RuntimeError, Stop)
            with pytest.raises(error):
                forward(model, cache, IDS[:, at : at + 1])
    lengths = [getattr(layer, "length", None) for layer in cache.layers]
    with pytest.raises(RuntimeError, match="past"):
        cache.crop(-1)
    assert [getattr(layer, "length", None) for layer in cache.layers] == lengths
    cache.reset()
    assert same(go_on(model, cache, 0, at), go_on(model, MixKVQCache(config=model.config), 0, at))


# ---- anywhere ------------------------------------------------------------------------------------------------------
_CHECKED = {"RESUME", "JUMP_BACKWARD", "CALL", "CALL_KW", "CALL_FUNCTION_EX"}
"""At the end of these the interpreter lets signals in."""


@functools.cache
def _handlers(code: CodeType) -> list[tuple[int, int, int]]:
    """(begin, end, handler) of what `try` covers, as `dis` reads it."""
    return [(entry.start, entry.end, entry.target) for entry in dis._parse_exception_table(code)]


def _handler(code: CodeType, at: int) -> int | None:
    return next((target for begin, end, target in _handlers(code) if begin <= at < end), None)


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """Ctrl-C arrives at the moment number ``at`` of all when this package runs; how many there were."""
    moments, last = [0], dict[FrameType, int]()

    def step(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            before, code = last[frame], frame.f_code
            last[frame] = frame.f_lasti
            # what is raised here belongs to the next instruction: it must not be out of the reach of a `try`
            if dis.opname[code.co_code[before]] not in _CHECKED:
                return step
            if _handler(code, before) == _handler(code, frame.f_lasti):
                moments[0] += 1
                if moments[0] == at:
                    raise KeyboardInterrupt
        return step

    def call(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS) or frame.f_code.co_name == "__del__":  # Python goes on there
            return None
        frame.f_trace_opcodes = True
        last[frame] = frame.f_lasti  # its RESUME
        return step

    former = sys.gettrace()
    sys.settrace(call)
    try:
        yield moments
    finally:
        sys.settrace(former)


def sweep(name: str, first: int, step: int) -> tuple[int, int, int]:
    """(moments of a pass, those tried, those after which the cache had to be emptied)."""
    model = tiny("llama")
    base, at, n = begun(name, model)
    want = go_on(model, copy.deepcopy(base), at, n)
    cache = copy.deepcopy(base)
    with interrupted(0) as moments:
        forward(model, cache, IDS[:, at : at + n])
    tried = emptied = 0
    for moment in range(first, moments[0] + 1, step):
        cache = copy.deepcopy(base)
        with pytest.raises(KeyboardInterrupt) as stop, interrupted(moment):
            forward(model, cache, IDS[:, at : at + n])
        where = stop.traceback[-2]  # the last is `step`
        try:
            back_to(cache, at)
            got = go_on(model, cache, at, n)
        except RuntimeError as error:
            assert "cache.reset()" in str(error), (name, moment, where, error)
            emptied += 1
            cache.reset()
            got = [forward(model, cache, IDS[:, : at + n])[:, -n:], forward(model, cache, IDS[:, at + n : at + n + 15])]
        assert same(got, want), (name, moment, where)
        tried += 1
    return moments[0], tried, emptied


@pytest.mark.parametrize(("name", "step"), list(zip(PASSES, (97, 23, 31, 37), strict=True)))
def test_ctrl_c_now_and_then(name, step):
    moments, tried, emptied = sweep(name, 3, step)
    print(name, moments, tried, emptied)
    assert tried > 20 and emptied <= tried // 5


@pytest.mark.parametrize("what", ["save", "fork", "copy", "crop", "reset"])
def test_ctrl_c_leaves_no_mark(what, tmp_path):
    """Whatever needs all of a cache: nothing is in use afterwards, and it is whole, as before or as after."""
    model = tiny("llama")
    base, at, n = begun("step", model)
    want, wanted_empty = go_on(model, copy.deepcopy(base), at, n), go_on(model, lossless(), 0, at)
    do = {
        "save": lambda cache: cache.save(tmp_path / "c"),
        "fork": lambda cache: cache.fork(1),
        "copy": copy.deepcopy,
        "crop": lambda cache: cache.crop(-1),
        "reset": lambda cache: cache.reset(),
    }[what]
    cache = copy.deepcopy(base)
    with interrupted(0) as moments:
        do(cache)
    for moment in range(1, moments[0] + 1, 1 + moments[0] // 60):
        cache = copy.deepcopy(base)
        layers = list(cache.layers)
        with pytest.raises(KeyboardInterrupt), interrupted(moment):
            do(cache)
        assert [each.busy for each in (cache, *layers)] == [0, 0, 0], moment
        (length,) = {layer.length for layer in cache.layers} or {0}
        assert length == at or (what, length) in (("crop", at - 1), ("reset", 0)), moment
        if length == at - 1:
            forward(model, cache, IDS[:, length:at])
        assert same(*((go_on(model, cache, at, n), want) if length else (go_on(model, cache, 0, at), wanted_empty)))
    assert moments[0] > 20


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_ctrl_c_at_every_moment(name):
    moments, tried, emptied = sweep(name, 1, 1)
    print(name, moments, tried, emptied)
    assert tried == moments > 500 and emptied <= tried // 20


def sweep_save(folder: Path, first: int, step: int) -> tuple[int, int, int]:
    """(moments of a `save`, those tried, those after which the new file was there)."""
    model, path = tiny("llama", num_hidden_layers=1), folder / "c"
    cache, at, n = begun("step that packs", model)
    want = go_on(model, copy.deepcopy(cache), at, n)
    old = b"old"
    with interrupted(0) as moments:
        cache.save(path)
    new, tried, replaced = path.read_bytes(), 0, 0
    for moment in range(first, moments[0] + 1, step):
        path.write_bytes(old)
        with pytest.raises(KeyboardInterrupt) as stop, interrupted(moment):
            cache.save(path)
        where = moment, stop.traceback[-2]
        assert os.listdir(folder) == ["c"], where
        found = path.read_bytes()
        assert found in (old, new), where
        tried += 1
        replaced += found == new
    cache.save(path)
    assert path.read_bytes() == new
    for each in (cache, MixKVQCache.load(path)):
        assert same(go_on(model, each, at, n), want)
    return moments[0], tried, replaced


def test_ctrl_c_now_and_then_while_a_cache_is_saved(tmp_path):
    moments, tried, replaced = sweep_save(tmp_path, 3, 97)
    print(moments, tried, replaced)
    assert tried > 50 and replaced <= tried // 20


@pytest.mark.exhaustive
@pytest.mark.slow
def test_ctrl_c_at_every_moment_while_a_cache_is_saved(tmp_path):
    moments, tried, replaced = sweep_save(tmp_path, 1, 1)
    print(moments, tried, replaced)
    assert tried == moments > 500 and 0 < replaced <= tried // 20


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_real_ctrl_c_at_any_time(monkeypatch):
    """From another thread, while prompts are read; the signal is a real one."""
    model = tiny("llama", num_hidden_layers=4)
    want, draw = go_on(model, lossless(), 0, 100), random.Random(3)
    stopped, lost, emptied = 0, list[Any](), 0
    monkeypatch.setattr(sys, "unraisablehook", lost.append)  # in a `__del__`: Python reports it and goes on
    for _ in range(120):
        cache, before = lossless(), len(lost)
        timer = threading.Timer(draw.uniform(0.001, 0.03), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            for _ in range(1000):
                go_on(model, cache, 0, 100)
                back_to(cache, 0)
                if len(lost) > before:
                    break
            else:
                raise AssertionError("Ctrl-C was swallowed")
        except KeyboardInterrupt:
            stopped += 1
        timer.join()
        try:
            back_to(cache, 0)
            got = go_on(model, cache, 0, 100)
        except RuntimeError as error:
            assert "cache.reset()" in str(error)
            emptied += 1
            cache.reset()
            got = go_on(model, cache, 0, 100)
        assert same(got, want)
    print(stopped, emptied, [each.object for each in lost])
    assert stopped + len(lost) == 120 and len(lost) <= 2 and emptied <= 12  # nothing here has a `__del__` of ours
    assert all(each.exc_type is KeyboardInterrupt for each in lost)
