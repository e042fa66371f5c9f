"""`Calibration`: what was found for one model, in a small JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Fields of `MixKVQConfig` for a model, and for single layers of it.

    Attributes
    ----------
    fingerprint : str
        Of the model's configuration (`mixkvq.fingerprint`).
    fields : mapping
        Fields that replace the preset's, such as ``{"thresholds": [2.1, 1.15]}``.
    layers : mapping
        Layer index -> fields that replace those for this layer alone.
    """

    fingerprint: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The calibration as JSON; `from_json` reads it back."""
        layers = {str(index): dict(fields) for index, fields in sorted(self.layers.items())}
        data = {"version": VERSION, "fingerprint": self.fingerprint, "fields": dict(self.fields), "layers": layers}
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            For another version, or what is no calibration.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else None
            raise ValueError(f"calibration has version {found!r}, must be {VERSION}")
        layers = {int(index): dict(fields) for index, fields in data["layers"].items()}
        return cls(str(data["fingerprint"]), dict(data["fields"]), layers)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file; raises as `from_json`, or OSError."""
        return cls.from_json(Path(path).read_text())
