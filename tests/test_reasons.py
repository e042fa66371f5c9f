"""Every reason has a remedy and one home; a layer that leaves the packed path says so once, with both."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import re
import types
import warnings
from pathlib import Path

import pytest
import torch
from models import forward, generate, lossless, paths, prompts, tiny
from one_layer import HEADS, QUERY_HEADS, Layer, Module, attention, found, packed_layer
from versions import needs_linear

import mixkvq
from mixkvq import reasons
from mixkvq.reasons import Reason
from mixkvq.report import LayerReport, Report

PACKAGE = Path(mixkvq.__file__).parent
SAMPLES = {
    "str": "name",
    "int": 7,
    "bool": True,
    "float": 0.5,
    "list[int]": [1, 2],
    "object": "a thing",
    "int | None": 7,
    "Iterable[str]": "ab",
}


def declared() -> dict[str, Reason]:
    """All reasons; those with parameters with samples for them."""
    found = {}
    for name, thing in vars(reasons).items():
        if isinstance(thing, Reason):
            found[name] = thing
        elif isinstance(thing, types.FunctionType) and thing.__module__ == reasons.__name__:
            parameters = inspect.signature(thing).parameters.values()
            found[name] = thing(*(SAMPLES[p.annotation] for p in parameters if p.default is p.empty))
            for p in parameters:
                if p.default is not p.empty:
                    found[f"{name}({p.name})"] = thing("name", **{p.name: SAMPLES[p.annotation]})
    return found


def calls(path: Path) -> list[str]:
    """Names of everything that a file calls."""
    nodes = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [node.id if isinstance(node, ast.Name) else getattr(node, "attr", "") for node in nodes]


def test_every_reason_says_what_happened_and_what_to_do():
    assert len(declared()) >= 30
    for name, reason in declared().items():
        assert isinstance(reason, Reason), name
        assert reason.what and reason.remedy and not reason.what.endswith(".") and not reason.remedy.endswith("."), name
        assert re.match(
            "nothing to do|memory falls|call |pass |run |load |use |leave |unset |keep |do not |in the model's code"
            "|the next attention|the model works|query heads must",
            reason.remedy,
        ), f"{name}: {reason.remedy!r} names nothing that a user could do"
        assert str(reason) == f"{reason.what} -> {reason.remedy}"


def test_reasons_are_made_in_one_place_and_all_are_used():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "reasons.py"]
    assert not [path for path in files if "Reason" in calls(path)]
    text = "\n".join(path.read_text() for path in files)
    unused = [
        name
        for name in {each.partition("(")[0] for each in declared()}
        if not re.search(rf"reasons(\.| import .*\b){name}\b", text)
    ]
    assert not unused


def test_a_reason_survives_copies_and_cannot_be_changed():
    reason = reasons.waiting(132)
    assert pickle.loads(pickle.dumps(reason)) == copy.deepcopy(reason) == reason
    with pytest.raises(AttributeError):
        reason.remedy = ""


def test_the_report_groups_layers_by_reason():
    why = [reasons.packed("f"), reasons.transformers_layer("DynamicSlidingWindowLayer", window=512)]
    layers = [LayerReport(i, "native" if i in (2, 5) else "packed", why[i in (2, 5)], 9, 9, 9) for i in range(7)]
    lines = str(Report("default", layers)).splitlines()[-2:]
    assert lines == [
        "layers 0-1, 3-4, 6 packed: f proved to be what the kernel computes -> nothing to do",
        "layers 2, 5 native: transformers' DynamicSlidingWindowLayer: at most 512 tokens are kept -> nothing to do",
    ]
    assert layers[2].reason == why[1].what and layers[2].remedy == "nothing to do"


@pytest.mark.parametrize(
    "family, words",
    [
        ("mistral", "at most 48 tokens"),
        pytest.param("qwen3_next", "a state that does not grow", marks=needs_linear),
        ("deepseek_v3", "MLA"),
    ],
)
def test_where_nothing_is_wrong_nothing_is_to_do(family, words):
    cache = lossless()
    generate(tiny(family), prompts([60]), cache, 3)
    layer = cache.report().layers[0]
    assert words in layer.reason and layer.remedy.startswith("nothing to do")


# ---- one warning ---------------------------------------------------------------------------------------------------
def weights(layer):
    layer.step(output_attentions=True)


def another_function(layer):
    layer.function = lambda *args, **kwargs: attention(*args, **kwargs)
    layer.step()


def compiled(layer):
    layer.cache._update_outside_graph(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)


def an_operator(layer):
    keys, _ = layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)
    keys * 2


def torn(layer):
    keys, _ = layer.cache.update(layer.draw(HEADS, 1), layer.draw(HEADS, 1), 0)
    values = layer.cache.layers[0].values
    found(attention)(Module(), layer.draw(QUERY_HEADS, 1), keys, values, None, scaling=1.0)


def gradients(layer):
    layer.cache.update(layer.draw(HEADS, 1).requires_grad_(), layer.draw(HEADS, 1), 0)


def assigned(layer):
    layer.cache.layers[0].keys = layer.cache.layers[0].keys


def hook_out(layer):
    try:
        mixkvq.uninstall()
        layer.step()
    finally:
        mixkvq.install()


def hook_replaced(layer):
    from mixkvq.compat import attention_lookup

    owner, name = attention_lookup()
    ours = owner.__dict__[name]
    try:
        setattr(owner, name, lambda self, name, default=None: default or self._global_mapping[name])
        layer.step()
    finally:
        setattr(owner, name, ours)


@pytest.mark.parametrize(
    "leave, reason",
    [
        (weights, reasons.WEIGHTS),
        (another_function, reasons.other_function("test_reasons.another_function.<locals>.<lambda>")),
        (compiled, reasons.COMPILED),
        (an_operator, reasons.operator("aten.mul.Tensor")),
        (torn, reasons.TORN),
        (gradients, reasons.GRADIENTS),
        (assigned, reasons.ASSIGNED),
        (hook_out, reasons.HOOK_OUT),
        (hook_replaced, reasons.HOOK_REPLACED),
    ],
)
def test_leaving_the_packed_path_warns_once_with_layer_reason_and_remedy(leave, reason):
    layer = packed_layer()
    with pytest.warns(UserWarning) as caught:
        leave(layer)
        if leave not in (gradients, assigned):
            leave(layer)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("MixKVQCache: layer 0: ") and str(reason) in message
    report = layer.cache.report()
    if leave in (gradients, assigned):
        assert report.layers[0].path == "native" and report.layers[0].why == reason
    else:
        assert report.layers[0].decoded_for == reason and report.layers[0].dequantizations > 0
        assert f"layer 0 decoded at times: {reason}" in str(report)


def test_a_layer_that_is_never_read_packed_warns_once_too():
    cache = lossless()
    with pytest.warns(UserWarning) as caught:
        generate(tiny("bloom", "eager"), prompts([60]), cache, 5)
    assert len(caught) == 1
    assert f"layer 0: keys and values are decoded in every step: {reasons.INVISIBLE}" in str(caught[0].message)
    assert "padding is stored as tokens are" in reasons.INVISIBLE.what


def test_a_cache_that_sees_no_masks_stores_padding():
    cache, inputs = lossless(), prompts([60, 41])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(tiny("bloom", "eager"), inputs, cache, 5)
    assert cache.layers[0].reason is reasons.INVISIBLE and cache.layers[0].store.start.tolist() == [0, 0]
    assert cache.report().layers[0].elements == 2 * 2 * cache.layers[0].keys.shape[1] * 64 * 16


@pytest.mark.parametrize("way", ["forbidden", "taken out"])
def test_a_cache_without_the_hook_says_so(way, monkeypatch):
    cache = lossless()
    try:
        mixkvq.uninstall()
        if way == "forbidden":
            monkeypatch.setenv("MIXKVQ_HOOK", "off")
        with pytest.warns(UserWarning, match=r"MIXKVQ_HOOK=off" if way == "forbidden" else r"mixkvq\.install\(\)"):
            forward(tiny("llama"), cache, prompts([60])["input_ids"])
            forward(tiny("llama"), cache, prompts([1])["input_ids"])
        assert paths(cache) == ["dequantized"] * 2
    finally:
        monkeypatch.delenv("MIXKVQ_HOOK", raising=False)
        mixkvq.install()


@pytest.mark.slow
@pytest.mark.parametrize("eager_prefill", [False, True])
def test_a_compiled_model_is_named(eager_prefill):
    torch._dynamo.reset()  # past its recompilation limit, nothing is compiled any more
    model, cache = tiny("llama", seed=6), lossless()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forward(model if eager_prefill else compiled, cache, prompts([60])["input_ids"])
        forward(compiled, cache, prompts([1])["input_ids"])
        forward(compiled, cache, prompts([1])["input_ids"])
    ours = [w for w in caught if "MixKVQCache" in str(w.message)]
    assert len(ours) == 1 and str(reasons.COMPILED) in str(ours[0].message) and "layer 0" in str(ours[0].message)


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = Layer(lossless())
        for _ in range(80):
            layer.step()
    assert layer.cache.report().layers[0].decoded_for is None


# ---- what is waited for --------------------------------------------------------------------------------------------
def why(layer):
    return layer.cache.report().layers[0].why


def rows(*starts, n=1, total):
    """A causal mask of rows that begin at these columns."""
    return torch.ones(n, total, dtype=torch.bool).tril(total - n) & (
        torch.arange(total) >= torch.tensor(starts).view(-1, 1, 1, 1)
    )


def test_a_row_without_tokens_is_waited_for_until_it_has_enough():
    layer = Layer(lossless(), batch=2)
    layer.step(10, rows(10, 5, n=10, total=10))
    assert why(layer) == reasons.waiting(32)
    layer.step(30, rows(40, 5, n=30, total=40))
    assert why(layer) == reasons.NO_REAL_TOKEN
    layer.step(1, rows(40, 5, total=41))
    assert layer.cache.layers[0].path == "packed"


def test_all_rows_begin_late():
    layer = Layer(lossless(), batch=2)
    layer.step(40, rows(40, 40, n=40, total=40))
    assert why(layer) == reasons.NO_REAL_TOKEN
    layer.step(1, rows(40, 40, total=41))
    assert why(layer) == reasons.waiting(32), "every row has a token now, and too few"


def test_what_proves_nothing_is_no_lack_of_tokens():
    def nan(*args, **kwargs):
        output, weights = attention(*args, **kwargs)
        return output * torch.nan, weights

    layer = Layer(lossless(), nan)
    for _ in range(40):
        layer.step()
    assert why(layer) == reasons.UNPROVED and layer.cache.layers[0].path == "native"
    layer.function = attention
    layer.step()
    assert layer.cache.layers[0].path == "packed"


@pytest.mark.parametrize("name", sorted(declared()))
def test_no_remedy_is_eager_where_eager_cannot_be_seen(name):
    remedy = declared()[name].remedy
    assert '"eager"' not in remedy or '"eager" from transformers 5.1 on' in remedy


@pytest.mark.parametrize("reason", [reasons.DROPOUT, reasons.GRADIENTS, reasons.COMPILED])
def test_a_layer_that_left_for_good_needs_a_new_cache(reason):
    assert "a new cache" in reason.remedy
