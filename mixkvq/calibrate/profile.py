"""A profile: every layer's own bits, for keys and for values, within the bytes of the preset.

Every layer is measured alone, the others exact: the KL that its keys cause with one column fewer, as many and one more,
and its values with one bit fewer, as many and one more (or with the range rule "minmax"). KL is nearly additive over
layers, so choosing is a knapsack: start with the least of everything and take the steps that gain most KL per byte
(along the lower hull of every layer's keys and values) until the preset's bytes are spent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache import MixKVQCache
from ..calibration import Calibration
from ..config import MixKVQConfig
from ..eval.stats import Interval, ratio_interval
from ..eval.stream import Emit
from ..fingerprint import fingerprint
from ..policy.patterns import column_count, counts_of, full_menu
from .reading import Readings

_VALUE_BITS = (1, 2, 3, 4, 8)
_EXACT_KEYS = {"key_patterns": (((16, 64),),)}
_EXACT_VALUES = {"value_bits": 16}


@dataclass(frozen=True)
class Choice:
    """One way to code the keys or the values of a layer, and what it costs."""

    fields: Mapping[str, Any]
    nbytes: float
    kl: float


def key_choices(config: MixKVQConfig) -> list[dict[str, Any]]:
    """Menus with one column per 64 channels fewer, the preset's, and one more."""
    columns = column_count(counts_of(dict(config.key_patterns[0])))
    choices: list[dict[str, Any]] = []
    for count in (columns - 1, columns, columns + 1):
        menu = config.key_patterns if count == columns else tuple(tuple(p.items()) for p in full_menu(count)[:16])
        if menu:
            choices.append({"key_patterns": menu})
    return choices


def value_choices(config: MixKVQConfig) -> list[dict[str, Any]]:
    """The preset's bits and those beside them, with both range rules."""
    at = _VALUE_BITS.index(config.value_bits)
    widths = _VALUE_BITS[max(at - 1, 0) : at + 2]
    return [{"value_bits": bits, "value_range": rule} for bits in widths for rule in ("search", "minmax")]


def measure_layers(readings: Readings, config: MixKVQConfig, emit: Emit) -> list[list[Choice]]:
    """Choices of every layer: a list for its keys and one for its values, layer by layer (packed layers only)."""
    count = readings.model.config.get_text_config(decoder=True).num_hidden_layers
    keys, values = key_choices(config), value_choices(config)
    done, total = 0, count * (len(keys) + len(values))
    items = []
    for layer in range(count):
        for fields, other in ((keys, _EXACT_VALUES), (values, _EXACT_KEYS)):
            choices = []
            for choice in fields:
                found = _alone(readings, config, layer, {**other, **choice})
                if found is not None:
                    choices.append(Choice(choice, *found))
                done += 1
                emit("chunk", (done, total))
            items.append(choices)
    return items


def _alone(
    readings: Readings, config: MixKVQConfig, layer: int, fields: Mapping[str, Any]
) -> tuple[float, float] | None:
    """(bytes of the layer's records, KL) with one layer coded and the others exact; None if it is not packed."""
    others = Calibration(
        fingerprint(readings.model.config), "default", {}, {layer: {**fields, "allocate": config.allocate}}
    )
    caches = []

    def make() -> MixKVQCache:
        exact = config.replace(allocate="exact")
        caches.append(MixKVQCache(exact, config=readings.model.config, calibration=others))
        return caches[-1]

    kl = readings.measure(make).kl
    nbytes = sum(cache.report().layers[layer].record_bytes for cache in caches)
    return (float(nbytes), kl) if nbytes else None


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of KL over bytes, from the fewest bytes on; only what gains is kept."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.kl)):
        if kept and choice.kl >= kept[-1].kl:
            continue
        while len(kept) > 1 and _gain(kept[-1], choice) >= _gain(kept[-2], kept[-1]):
            kept.pop()
        kept.append(choice)
    return kept


def _gain(a: Choice, b: Choice) -> float:
    return (a.kl - b.kl) / (b.nbytes - a.nbytes)


def allocate(items: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One choice per item, the sum of their bytes at most ``budget``.

    Raises
    ------
    ValueError
        If the smallest choices exceed the budget.
    """
    hulls = [hull(choices) for choices in items]
    at = [0] * len(hulls)
    spent = sum(h[0].nbytes for h in hulls)
    if spent > budget:
        raise ValueError(f"budget is {budget:.0f} bytes, the smallest choices take {spent:.0f}")
    steps = sorted(
        ((_gain(h[i], h[i + 1]), item, i) for item, h in enumerate(hulls) for i in range(len(h) - 1)), reverse=True
    )
    blocked: set[int] = set()
    for _, item, i in steps:  # gains fall along a hull, so that a layer's steps come in order
        extra = hulls[item][i + 1].nbytes - hulls[item][i].nbytes
        if item in blocked or spent + extra > budget:
            blocked.add(item)
            continue
        at[item], spent = i + 1, spent + extra
    return [h[i] for h, i in zip(hulls, at, strict=True)]


@dataclass(frozen=True)
class Profile:
    """A profile and how it did on texts that it was not made from."""

    calibration: Calibration
    ratio: Interval
    """KL of the profile / KL of the preset, held-out texts, paired."""
    true_bits: tuple[float, float]
    """Of the profile and of the preset, on the held-out texts."""
    kl: tuple[float, float]


def make_profile(readings: Readings, held_out: Readings, preset: str, fields: Mapping[str, Any], emit: Emit) -> Profile:
    """Measure the layers, choose, and try the whole on other texts.

    Parameters
    ----------
    readings, held_out : Readings
    preset : str
        One of ours: with patterns.
    fields : mapping
        Fields that replace the preset's, for the measurements too.
    emit : callable
        Told of ("chunk", (done, total)).
    """
    config, model = MixKVQConfig.preset(preset, **fields), readings.model
    items = measure_layers(readings, config, emit)
    packed = [i for i in range(len(items) // 2) if items[2 * i] and items[2 * i + 1]]
    chosen_from = [item for i in packed for item in items[2 * i : 2 * i + 2]]
    usual = [_usual(item, config) for item in chosen_from]
    chosen = allocate(chosen_from, sum(choice.nbytes for choice in usual))
    layers = {
        layer: {
            name: value
            for choice in chosen[2 * at : 2 * at + 2]
            for name, value in choice.fields.items()
            if value != getattr(config, name)
        }
        for at, layer in enumerate(packed)
    }
    calibration = Calibration(
        fingerprint(model.config), preset, dict(fields), {i: own for i, own in layers.items() if own}
    )
    base = held_out.measure(lambda: MixKVQCache(config, config=model.config))
    ours = held_out.measure(lambda: MixKVQCache(preset, config=model.config, calibration=calibration))
    return Profile(
        calibration, ratio_interval(ours.units, base.units), (ours.true_bits, base.true_bits), (ours.kl, base.kl)
    )


def _usual(choices: Sequence[Choice], config: MixKVQConfig) -> Choice:
    """The preset's own choice."""
    return next(c for c in choices if all(getattr(config, name) == value for name, value in c.fields.items()))
