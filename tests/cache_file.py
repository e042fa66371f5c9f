"""The bytes of a saved cache, taken apart and put together again with a right checksum: what an attacker can do."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from models import forward, prompts, tiny

from mixkvq import MixKVQCache

SHORT = {"block_length": 32, "residual_length": 32, "key_group_size": 32}
"""Fields of a cache, so that short prompts are packed."""

DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I64": np.int64, "U8": np.uint8}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
RIGHT = "0" * 64
"""In the place of a checksum: the one that belongs to the rest."""


def save_one(path: Path) -> Path:
    """Save a cache of a sliding and a packed layer, two rows, one padded."""
    cache, inputs = MixKVQCache(**SHORT), prompts([90, 77])
    forward(tiny("gemma3"), cache, inputs["input_ids"], inputs["attention_mask"])
    cache.save(path)
    return path


def save_plain(path: Path) -> Path:
    """Save a cache of two layers that are not packed yet, and hold keys and values alone."""
    cache = MixKVQCache("kivi-2", **SHORT)
    forward(tiny(), cache, prompts([20])["input_ids"])
    cache.save(path)
    return path


def own_path() -> dict[str, str]:
    """The environment for a process that imports what this one can, and nothing from the folder it starts in."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}


class CacheFile:
    """A file's content; change it, then `write`.

    Attributes
    ----------
    metadata : dict
        Its "checksum" is `RIGHT` until it is changed.
    about : dict
        The JSON under "cache".
    tensors : dict
        NumPy arrays by name.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        self.metadata: dict[str, str] = header.pop("__metadata__") | {"checksum": RIGHT}
        self.about: dict[str, Any] = json.loads(self.metadata["cache"])
        self.tensors: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            begin, stop = (end + at for at in entry["data_offsets"])
            self.tensors[name] = np.frombuffer(data[begin:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()

    def header(self) -> dict[str, Any]:
        """As it will be written, without metadata."""
        found, at = {}, 0
        for name, tensor in self.tensors.items():
            end = at + tensor.nbytes
            found[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [at, end]}
            at = end
        return found

    def write(self, path: Path, cache: str | None = None, header: dict[str, Any] | None = None) -> Path:
        """Write it, unless its checksum was changed with the one that belongs to it.

        Parameters
        ----------
        path : Path
        cache : str, optional
            Text instead of the JSON.
        header : dict, optional
            Instead of `header`.
        """
        cache = json.dumps(self.about) if cache is None else cache
        metadata = {**self.metadata, "cache": cache}
        text = json.dumps({"__metadata__": metadata, **(self.header() if header is None else header)}).encode()
        data = b"".join(tensor.tobytes() for tensor in self.tensors.values())
        if metadata.get("checksum") == RIGHT:
            digest = hashlib.sha256(text + data).hexdigest()
            text = text.replace(RIGHT.encode(), digest.encode(), 1)
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return path
