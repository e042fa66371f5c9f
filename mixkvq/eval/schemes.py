"""`Scheme`: one way of keeping keys and values, by name: what `mixkvq eval --schemes` understands.

======================  ================================================================================================
``exact``               transformers' `DynamicCache`
``PRESET``              a preset (`mixkvq.list_presets`), packed for real
``PRESET@FILE``         with the calibration in a file; fields behind colons, and common ones, win over it
``simulated/PRESET``    the same on the NumPy reference, its decoded values handed to the model
a rival                 another method, see `mixkvq.eval.rivals`; all but ``error-only`` are simulated
``hqq-B``, ``quanto-B``  transformers' `QuantizedCache` with B bits, where the package is installed
======================  ================================================================================================

Fields follow behind colons: ``default:value_bits=4:sink_length=0``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..calibration import Calibration
from ..config import MixKVQConfig, list_presets
from ..errors import UserError
from . import rivals

EXACT = "exact"
_SIMULATED = "simulated/"


@dataclass(frozen=True)
class Scheme:
    """A named way of making empty caches.

    Attributes
    ----------
    name : str
        As the user wrote it.
    kind : {"exact", "packed", "simulated", "transformers"}
    config : MixKVQConfig or None
        When blocks are coded, and for packed schemes how.
    details : str
        All that decides the result, for finding a result again.
    """

    name: str
    kind: str
    config: MixKVQConfig | None
    details: str
    _build: Callable[[Any], Any]

    def cache(self, model: Any) -> Any:
        """An empty cache for a model."""
        return self._build(model)

    @property
    def label(self) -> str:
        """The name, marked where nothing is packed for real."""
        return f"{self.name} (simulated)" if self.kind == "simulated" else self.name


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _fields(parts: list[str], name: str) -> dict[str, Any]:
    fields = {}
    for part in parts:
        field, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"scheme {name!r}: {part!r} must be FIELD=VALUE")
        fields[field] = _value(value)
    return fields


def parse_scheme(text: str, common: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme that a name with fields means.

    Parameters
    ----------
    text : str
    common : mapping, optional
        Fields of `MixKVQConfig` for every scheme, such as ``sink_length``, unless the scheme sets them itself.

    Raises
    ------
    UserError
        For an unknown name or a wrong field.
    """
    name, *parts = _split(text, ":")
    own = _fields(parts, text)
    try:
        return _scheme(text, name, own, {**(common or {}), **own})
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"scheme {text!r}: {error}") from error


def _scheme(text: str, name: str, own: dict[str, Any], fields: dict[str, Any]) -> Scheme:
    if name == EXACT:
        if own:
            raise ValueError("exact has no fields")
        return Scheme(text, "exact", None, EXACT, _exact)
    if name.startswith(_SIMULATED):
        from .simulate import ReferenceSimulator

        config = MixKVQConfig.preset(name.removeprefix(_SIMULATED), **fields)
        simulator = ReferenceSimulator(config)
        return Scheme(text, "simulated", config, f"reference {config.to_json()}", _simulated(simulator))
    if name in rivals.PACKED:
        preset, changes = rivals.PACKED[name]
        return _packed(text, preset, {**changes, **fields})
    if name in rivals.SIMULATED:
        rival = rivals.SIMULATED[name](fields)
        return Scheme(text, "simulated", rival.config, f"{name} {rival.config.to_json()}", _simulated(rival))
    if match := re.fullmatch(r"(hqq|quanto)-(\d+)", name):
        details, build = rivals.transformers_cache(match[1], int(match[2]), own)
        return Scheme(text, "transformers", None, details, build)
    preset, at, file = name.partition("@")
    if preset not in list_presets():
        known = [EXACT, *list_presets(), *rivals.PACKED, *rivals.SIMULATED, "hqq-4", "quanto-4", f"{_SIMULATED}PRESET"]
        raise ValueError(f"unknown; known: {', '.join(known)}")
    return _packed(text, preset, fields, Calibration.load(file) if at else None)


def _packed(text: str, preset: str, fields: dict[str, Any], calibration: Calibration | None = None) -> Scheme:
    config = MixKVQConfig.preset(preset, **fields)
    details = f"packed {config.to_json()}"
    if calibration is not None:
        calibration.check_preset(preset)
        config = calibration.config(config, fields)
        details = f"packed {config.to_json()} {calibration.to_json()} {json.dumps(fields, sort_keys=True)}"

    def build(model: Any) -> Any:
        from ..cache import MixKVQCache

        return MixKVQCache(preset, config=model.config, calibration=calibration, **fields)

    return Scheme(text, "packed", config, details, build)


def _exact(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _simulated(simulator: Any) -> Callable[[Any], Any]:
    def build(model: Any) -> Any:
        from .simulate import SimulatedCache

        return SimulatedCache(simulator, config=model.config)

    return build


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text; separators inside brackets or braces, however deep, belong to a part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def parse_schemes(text: str, common: Mapping[str, Any] | None = None) -> list[Scheme]:
    """Schemes separated by commas (commas inside brackets belong to a value); see `parse_scheme`."""
    names = [name.strip() for name in _split(text, ",") if name.strip()]
    if not names:
        raise UserError("--schemes is empty, must name at least one scheme, such as default,compact")
    if len(set(names)) < len(names):
        raise UserError(f"--schemes is {text!r}, must name every scheme once")
    return [parse_scheme(name, common) for name in names]
