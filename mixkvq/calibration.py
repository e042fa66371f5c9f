"""`Calibration`: what was found for one model, in a small JSON file that `MixKVQCache(calibration=...)` reads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import strict_json
from .config import MixKVQConfig
from .files import checked_path, opened
from .fingerprint import fingerprint

VERSION = 1
MAX_BYTES = 1 << 20
MAX_LAYERS = 4096
"""A configuration takes 2 kB of memory and, in a hostile file, 2 bytes of JSON."""
_SCHEDULE = ("sink_length", "residual_length", "block_length")
_INDEX = re.compile("0|[1-9][0-9]{0,5}")
_NAMES = frozenset(f.name for f in dataclasses.fields(MixKVQConfig))


@dataclass(frozen=True)
class Calibration:
    """Fields of `MixKVQConfig` for a model, and for single layers of it.

    Attributes
    ----------
    fingerprint : str
        Of the model's configuration (`mixkvq.fingerprint`).
    preset : str
        The preset that it was made for.
    fields : mapping
        Fields that replace the preset's, such as ``{"thresholds": [2.1, 1.15]}``.
    layers : mapping
        Layer index -> fields that replace those for this layer alone; not those of the schedule (sink_length,
        residual_length, block_length), which all layers share.
    summary : mapping
        What was measured, for people.

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """

    fingerprint: str
    preset: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("fingerprint", "preset"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is {getattr(self, name)!r}, must be a string")
        for name in ("layers", "summary"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} is {getattr(self, name)!r:.80}, must be an object")
        _check_fields("fields", self.fields)
        base = MixKVQConfig.preset(self.preset).replace(**self.fields)
        object.__setattr__(self, "fields", _as_configured(self.fields, base))
        layers = {}
        for index, fields in self.layers.items():
            if type(index) is not int or index < 0:
                raise ValueError(f"layers has the index {index!r}, must be whole numbers from 0")
            _check_fields(f"layers[{index}]", fields)
            for name in _SCHEDULE:
                if name in fields:
                    raise ValueError(f"layers[{index}] sets {name}, which all layers share: set it in fields")
            layers[index] = _as_configured(fields, base.replace(**fields))
        object.__setattr__(self, "layers", layers)

    # ---- what it means ---------------------------------------------------------------------------------------------
    def check_preset(self, name: str) -> None:
        """Refuse another preset than the one it was made for; "custom" configurations are taken as they are.

        Raises
        ------
        ValueError
            Naming both.
        """
        if name not in (self.preset, "custom"):
            raise ValueError(
                f"calibration is for the preset {self.preset!r}, not for {name!r}: pass "
                f"MixKVQCache({self.preset!r}, calibration=...)"
            )

    def config(self, preset: MixKVQConfig, overrides: Mapping[str, Any] | None = None) -> MixKVQConfig:
        """A preset's configuration with the fields of the calibration; ``overrides`` win over both."""
        return preset.replace(**{**self.fields, **(overrides or {})})

    def layer_configs(
        self, preset: MixKVQConfig, overrides: Mapping[str, Any] | None = None
    ) -> dict[int, MixKVQConfig]:
        """Configurations of the layers that have fields of their own."""
        given = overrides or {}
        return {index: self.config(preset, {**fields, **given}) for index, fields in self.layers.items() if fields}

    def check_model(self, config: Any) -> None:
        """Refuse a model that the calibration was not made for.

        Parameters
        ----------
        config : transformers.PreTrainedConfig

        Raises
        ------
        TypeError
            If ``config`` is not the configuration of a model.
        ValueError
            Naming both fingerprints.
        """
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config is {config!r}, must be a model's configuration, such as model.config")
        found = fingerprint(config)
        if found != self.fingerprint:
            raise ValueError(
                f"calibration is for {self.fingerprint}, the model is {found}: run `mixkvq calibrate` with this model"
            )
        layers = config.get_text_config(decoder=True).num_hidden_layers
        beyond = [index for index in self.layers if index >= layers]
        if beyond:
            raise ValueError(f"calibration has fields for layer {beyond[0]}, the model has {layers} layers")

    # ---- files -----------------------------------------------------------------------------------------------------
    def to_json(self) -> str:
        """The calibration as JSON.

        `from_json` reads it back to an equal object, if ``summary`` is made of numbers, text, lists and dicts by text.

        Raises
        ------
        ValueError, TypeError
            If `from_json` would refuse it, such as a NaN in ``summary``, or more than 4096 layers.
        """
        data = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "preset": self.preset,
            "fields": dict(self.fields),
            "layers": {str(index): dict(fields) for index, fields in sorted(self.layers.items())},
            "summary": dict(self.summary),
        }
        text = json.dumps(data, indent=1) + "\n"
        self.from_json(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError, TypeError
            For another version, or what is no calibration.
        """
        if len(text) > MAX_BYTES:
            raise ValueError(f"the text is larger than {MAX_BYTES} bytes: no calibration is")
        data = strict_json.parse(text)
        if not isinstance(data, dict):
            raise ValueError(f"a calibration in JSON is an object, not {text[:40]!r}")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise ValueError(f"version is {data.get('version')!r}, must be {VERSION}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown, missing = set(data) - known - {"version"}, known - set(data)
        if unknown or missing:
            raise ValueError(
                f"unknown entries {sorted(unknown)}, missing entries {sorted(missing)}; known: {sorted(known)}"
            )
        layers = by_layer("layers", data["layers"])
        return cls(
            data["fingerprint"],
            data["preset"],
            data["fields"],
            layers,
            data["summary"],
        )

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file. Only JSON is read, at most 1 MiB of it; nothing in it is executed.

        Raises
        ------
        ValueError
            Naming the file and what is wrong with it.
        TypeError
            If ``path`` is none.
        OSError
            If it cannot be read, or is no file.
        """
        with opened(checked_path(path)) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"calibration {path} is larger than {MAX_BYTES} bytes: no calibration is")
        try:
            return cls.from_json(data.decode())
        except (ValueError, TypeError) as error:
            raise ValueError(f"calibration {path}: {error!s:.1000}") from error

    @classmethod
    def of(cls, source: Any) -> Calibration:
        """A calibration as it is, or from its file.

        Raises
        ------
        TypeError
            For anything else.
        """
        if isinstance(source, Calibration):
            return source
        if isinstance(source, (str, Path)):
            return cls.load(source)
        raise TypeError(f"calibration is {source!r}, must be the path of a file or a Calibration")


def by_layer(name: str, value: Any) -> dict[int, Any]:
    """An object of JSON whose names are indices of layers.

    Raises
    ------
    TypeError, ValueError
        Saying what ``name`` is.
    """
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {value!r:.80}, must be an object")
    if len(value) > MAX_LAYERS:
        raise ValueError(f"{name} has {len(value)} entries, must have {MAX_LAYERS} at most")
    for key in value:
        if not _INDEX.fullmatch(key):
            raise ValueError(f"{name} has the index {key!r:.80}, must be whole numbers from 0")
    return {int(key): inner for key, inner in value.items()}


def _check_fields(where: str, fields: Any) -> None:
    if not isinstance(fields, Mapping):
        raise TypeError(f"{where} is {fields!r}, must be an object of fields of MixKVQConfig")
    for name in fields:
        if name not in _NAMES:
            raise ValueError(f"{where} has the unknown field {name!r}; known: {', '.join(sorted(_NAMES))}")


def _as_configured(fields: Mapping[str, Any], config: MixKVQConfig) -> dict[str, Any]:
    """Fields in the form that a configuration gives them, in which they are equal however they were written."""
    return {name: getattr(config, name) for name in fields}
