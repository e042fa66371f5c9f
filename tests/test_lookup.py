"""The hook beside other libraries' hooks, in every order, and what is left of it when it is taken out."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
import warnings

import pytest
import torch
from models import forward, generate, lossless, paths, prompts, tiny
from one_layer import attention
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

import mixkvq
from mixkvq import MixKVQCache, compat, lookup, reasons

OWNER, NAME = compat.attention_lookup()
LOOKUPS = ("get_interface", "__getitem__")


def state():
    """What transformers has in the place that we replace, and in those beside it."""
    return {name: OWNER.__dict__.get(name) for name in LOOKUPS}, dict(AttentionInterface._global_mapping)


@pytest.fixture(params=sorted({NAME, "__getitem__"}), autouse=True)
def clean(request, monkeypatch):
    """No hook at first, the hook again at the end; once more with the look-up of transformers before 5.1."""
    mixkvq.uninstall()
    before = state()
    if request.param != NAME:
        monkeypatch.setattr(compat, "LOOKUPS", (request.param,))
    yield request.param
    mixkvq.uninstall()
    assert state() == before
    monkeypatch.undo()
    mixkvq.install()


class Other:
    """Another library that replaces the same line."""

    def __init__(self, name, style="asks", wraps=True):
        self.name, self.style, self.wraps, self.calls = name, style, wraps, 0

    def install(self):
        self.owned = OWNER.__dict__.get(self.name)
        inner = getattr(OWNER, self.name)

        def look_up(instance, *args):
            self.calls += 1
            if self.style == "ignores":
                return AttentionInterface._global_mapping.get(args[0], *args[1:])
            function = inner(instance, *args)
            return self.around(function) if self.style == "wraps what it finds" else function

        setattr(OWNER, self.name, functools.wraps(inner)(look_up) if self.wraps else look_up)

    @staticmethod
    def around(function):
        def counted(module, query, key, value, *args, **kwargs):
            assert query.shape[0] == key.shape[0]
            return function(module, query, key, value, *args, **kwargs)

        return counted

    def uninstall(self):
        if self.owned is None:
            delattr(OWNER, self.name)
        else:
            setattr(OWNER, self.name, self.owned)


def works(model=None):
    """Whether a model's layers are packed now, with the right logits."""
    model, ids = model or tiny("llama"), prompts([60])["input_ids"]
    cache, dense = lossless(), DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (ids, ids[:, :1], ids[:, :1]):
            want, got = forward(model, dense, part), forward(model, cache, part)
            assert torch.allclose(got, want, atol=1e-4)
    return paths(cache) == ["packed"] * 2 and not any(layer.dequantizations for layer in cache.layers)


# ---- alone ---------------------------------------------------------------------------------------------------------
def test_uninstall_leaves_transformers_as_it_was(clean):
    before = state()
    for times in (1, 3):
        for _ in range(times):
            mixkvq.install()
        assert state()[0][clean] is not before[0][clean]
        for _ in range(times):
            mixkvq.uninstall()
        assert state() == before
        assert all(state()[0][name] is before[0][name] for name in LOOKUPS)


def test_the_hook_works_and_stops():
    assert works()
    mixkvq.uninstall()
    find = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert not hasattr(find, "__wrapped__")


# ---- beside another library ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("style", ["asks", "wraps what it finds"])
@pytest.mark.parametrize("wraps", [True, False], ids=["wraps", "bare"])
@pytest.mark.parametrize("theirs_first", [True, False])
def test_both_work_whoever_came_first(clean, style, wraps, theirs_first):
    other = Other(clean, style, wraps)
    steps = [other.install, mixkvq.install]
    for step in steps if theirs_first else reversed(steps):
        step()
    assert works() and other.calls > 0
    mixkvq.uninstall()
    other.uninstall()


@pytest.mark.parametrize(
    "order",
    [
        o
        for o in itertools.permutations(["ours in", "theirs in", "ours out", "theirs out"])
        if o.index("ours in") < o.index("ours out") and o.index("theirs in") < o.index("theirs out")
    ],
    ids=lambda order: ", ".join(order),
)
def test_every_order_of_coming_and_going(clean, order):
    before, other = state(), Other(clean)
    step = {
        "ours in": mixkvq.install,
        "ours out": mixkvq.uninstall,
        "theirs in": other.install,
        "theirs out": other.uninstall,
    }
    ours = theirs = False
    for name in order:
        step[name]()
        ours = name == "ours in" or (ours and name != "ours out")
        theirs = name == "theirs in" or (theirs and name != "theirs out")
        calls = other.calls
        ALL_ATTENTION_FUNCTIONS["sdpa"] if clean == "__getitem__" else compat.look_up(clean)
        assert (other.calls > calls) == theirs, f"their hook after {name!r}"
        found = ALL_ATTENTION_FUNCTIONS["sdpa"] if clean == "__getitem__" else look_up_sdpa()
        if (name, ours) != ("theirs out", True) or order.index("theirs in") > order.index("ours in"):
            assert (getattr(found, "__wrapped__", None) is not None) == ours, f"our hook after {name!r}"
    mixkvq.uninstall()  # after theirs, which put ours back: now it can go
    assert state() == before


def look_up_sdpa():
    if NAME == "__getitem__":
        return ALL_ATTENTION_FUNCTIONS["sdpa"]
    return ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", attention)


def test_installing_again_below_another_library_does_not_stack(clean):
    mixkvq.install()
    ours, other = OWNER.__dict__[clean], Other(clean)
    other.install()
    theirs = OWNER.__dict__[clean]
    for _ in range(3):
        mixkvq.uninstall()
        assert OWNER.__dict__[clean] is theirs and not works_quietly()
        mixkvq.install()
        assert OWNER.__dict__[clean] is theirs and works()
    other.uninstall()
    assert OWNER.__dict__[clean] is ours and works()


def works_quietly():
    """As `works`, with caches that do not install."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXKVQ_HOOK", "off")
        return works()


def test_a_library_that_puts_ours_aside_is_noticed_and_asked_first_next_time(clean):
    cache, model = lossless(), tiny("llama")
    other = Other(clean, "ignores")
    other.install()
    with pytest.warns(UserWarning, match="another library replaced"):
        forward(model, cache, prompts([60])["input_ids"])
        forward(model, cache, prompts([1])["input_ids"])
    layers = cache.report().layers
    assert all(layer.path == "dequantized" and layer.why == reasons.HOOK_REPLACED for layer in layers)
    if clean == "get_interface":
        assert works(), "a new cache installs on top"
    mixkvq.uninstall()
    other.uninstall()


def test_a_library_that_raises_when_probed_is_left_alone(clean):
    def refuses(self, *args):
        raise RuntimeError("not now")

    mixkvq.install()
    ours = OWNER.__dict__[clean]
    setattr(OWNER, clean, refuses)
    assert lookup.blindness() == reasons.HOOK_REPLACED
    setattr(OWNER, clean, ours)
    assert lookup.blindness() == reasons.INVISIBLE


@pytest.mark.skipif(NAME == "__getitem__", reason="before 5.1 functions are found by a subscript, which is the class's")
@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("theirs_first", [True, False])
def test_a_library_that_gives_the_instance_a_method(clean, asks, theirs_first):
    if clean != NAME:
        pytest.skip("the method is not looked up then")
    instance = ALL_ATTENTION_FUNCTIONS
    if not theirs_first:
        mixkvq.install()
    inner = instance.get_interface if asks else lambda name, default: instance._global_mapping.get(name, default)
    theirs = instance.get_interface = lambda name, default: inner(name, default)
    try:
        assert (lookup.blindness() == reasons.INVISIBLE) == (asks and not theirs_first)
        mixkvq.install()
        assert lookup.blindness() == reasons.INVISIBLE and works()
        mixkvq.uninstall()
        assert instance.get_interface is theirs
    finally:
        del instance.get_interface


# ---- other doors of transformers -----------------------------------------------------------------------------------
def test_the_interface_is_a_mapping_as_before(clean):
    names, instance = list(ALL_ATTENTION_FUNCTIONS), AttentionInterface()
    stored = instance["mine"] = attention
    mixkvq.install()
    assert list(ALL_ATTENTION_FUNCTIONS) == names and len(ALL_ATTENTION_FUNCTIONS) == len(names)
    assert "sdpa" in ALL_ATTENTION_FUNCTIONS and "none" not in ALL_ATTENTION_FUNCTIONS
    assert ALL_ATTENTION_FUNCTIONS.get("none") is None and ALL_ATTENTION_FUNCTIONS.get("none", 3) == 3
    with pytest.raises(KeyError, match="none"):
        ALL_ATTENTION_FUNCTIONS["none"]
    for copied in (instance, copy.copy(instance), copy.deepcopy(instance)):
        for found in (copied["mine"], copied.pop("mine")):
            assert (found.__wrapped__ if clean == "__getitem__" else found) is stored
        copied["mine"] = stored
        assert copied._local_mapping == {"mine": stored}
    del instance["mine"]
    assert "mine" not in instance
    mixkvq.uninstall()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is AttentionInterface._global_mapping["sdpa"]


def test_a_registered_function_is_proved_and_packed():
    def mine(*args, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    try:
        AttentionInterface.register("mine", mine)
        mixkvq.install()
        assert works(other_implementation("mine"))
    finally:
        AttentionInterface._global_mapping.pop("mine", None)


def test_a_registered_function_made_of_a_hooked_one_is_hooked_once():
    mixkvq.install()
    hooked = look_up_sdpa()

    def mine(*args, **kwargs):
        return hooked(*args, **kwargs)

    try:
        AttentionInterface.register("mine", mine)
        assert works(other_implementation("mine"))
        mixkvq.uninstall()
        assert torch.isfinite(forward(other_implementation("mine"), DynamicCache(), prompts([9])["input_ids"])).all()
    finally:
        AttentionInterface._global_mapping.pop("mine", None)


def other_implementation(name) -> PreTrainedModel:
    """A model that uses a registered function; masks as for sdpa."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS[name] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return tiny("llama", name, seed=3)


def test_a_subclass_of_the_interface_is_hooked_too(monkeypatch):
    class Mine(AttentionInterface):
        pass

    from transformers.models.llama import modeling_llama

    instance = Mine()
    instance["sdpa"] = lambda *args, **kwargs: AttentionInterface._global_mapping["sdpa"](*args, **kwargs)
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", instance)
    assert works()


# ---- models that do not use us -------------------------------------------------------------------------------------
def runs(implementation):
    """Everything that people do with a stock cache: all logits."""
    model, inputs = tiny("llama", implementation), prompts([60, 40])
    greedy = generate(model, inputs, DynamicCache(), 8)
    torch.manual_seed(7)
    sampled = model.generate(
        **inputs, max_new_tokens=8, do_sample=True, return_dict_in_generate=True, output_logits=True
    )
    beams = generate(model, inputs, None, 5, num_beams=3)
    return [*greedy.logits, *sampled.logits, *beams.logits]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_untouched_models_are_bit_identical(implementation):
    plain = runs(implementation)
    MixKVQCache()
    hooked = runs(implementation)
    assert len(plain) == len(hooked) and all(map(torch.equal, plain, hooked))


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_untouched_compiled_models_are_bit_identical(fullgraph):
    """Without graph breaks too, where nothing but what dynamo understands may lie in the way."""
    model, ids = tiny("llama", seed=8), prompts([12])["input_ids"]

    def run():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        cache = StaticCache(config=model.config, max_cache_len=32) if fullgraph else DynamicCache()
        return [forward(compiled, cache, part) for part in (ids, ids[:, :1], ids[:, :1])]

    plain = run()
    MixKVQCache()
    assert all(map(torch.equal, plain, run()))


# ---- threads -------------------------------------------------------------------------------------------------------
def test_threads_that_install_and_uninstall(clean):
    before, failures, stop = state(), [], threading.Event()

    def flip():
        while not stop.is_set():
            mixkvq.install()
            mixkvq.uninstall()

    def use():
        try:
            for _ in range(300):
                assert callable(look_up_sdpa()) and callable(ALL_ATTENTION_FUNCTIONS["sdpa"])
                lookup.blindness()
        except Exception as error:  # told to the main thread
            failures.append(error)

    flipping, using = ([threading.Thread(target=work) for _ in range(3)] for work in (flip, use))
    for thread in (*flipping, *using):
        thread.start()
    for thread in using:
        thread.join()
    stop.set()
    for thread in flipping:
        thread.join()
    mixkvq.uninstall()
    assert not failures and state() == before
