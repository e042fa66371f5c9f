"""Hostile files: saved caches and calibrations, mutated with a seed, in their text, their structure and their tensors.

Loading one gives a cache (which can be read, saved and loaded again) or a calibration, or the documented error, in
limited time, and takes no more address space than a multiple of the file's size.

    python tests/fuzz/files.py [--seconds 60] [--seed 1] [--found build/fuzz] [FILE ...]     FILE: only these, replayed
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cache_file import CacheFile, save_one, save_plain

from mixkvq import MixKVQCache
from mixkvq.calibration import Calibration
from mixkvq.errors import CacheFileError

ROOM, PER_BYTE = 16 << 20, 32
"""Address space that a file may take: arenas of the allocators, and the objects of JSON such as ``[[],[],[]]``."""
SECONDS = 20
CALIBRATION = {
    "version": 1,
    "fingerprint": "llama-0",
    "preset": "default",
    "fields": {"value_bits": 4, "thresholds": [2.1, 1.15]},
    "layers": {"0": {"value_bits": 8}, "3": {"key_group_size": 128}},
    "summary": {"trials": 3, "kl": 0.01},
}
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 10**400, -(10**30), 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "x", "0", "F32", "\ud800", "\0", "é" * 500, "x" * 5000, [], {}, [0], [[]],
    {"": None}, {"map": [[0, 1]]}, {"tensor": "layers.0.keys"}, [1] * 300, "\ud800" * 64, "0" * 64, "é" * 32,
]  # fmt: skip
SIZES = [0, 0, 1, 2, 16, 1000, 1 << 20, 1 << 31, 1 << 40, 1 << 47, (1 << 48) - 1]
TEXTS = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '"', "{", "\\u0000", "0x1", "\ufeff", ","]
Mutate = Callable[[random.Random, bytes], bytes]


# ---- what a file must give -----------------------------------------------------------------------------------------
class Finding(Exception):
    """A property that does not hold."""


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def load(path: Path) -> str:
    """Load a file as what its name says; returns what came of it.

    Raises
    ------
    Finding
    """
    limit = _address_space() + ROOM + PER_BYTE * path.stat().st_size
    old = resource.getrlimit(resource.RLIMIT_AS)
    began = time.monotonic()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, old[1]))
        try:
            made = Calibration.load(path) if path.suffix == ".json" else MixKVQCache.load(path)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, old)
        _use(made, path)
    except CacheFileError as error:
        if "MemoryError" in str(error) or "memory" in str(error).lower() or str(path) not in str(error):
            raise Finding(f"{error}") from error
        return "CacheFileError"
    except ValueError as error:
        if path.suffix != ".json" or str(path) not in str(error):
            raise Finding(f"{type(error).__name__}: {error}") from error
        return "ValueError"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        if time.monotonic() - began > SECONDS:
            raise Finding(f"took {time.monotonic() - began:.0f} s")
    return "loaded"


def _use(made: Any, path: Path) -> None:
    if isinstance(made, Calibration):
        assert Calibration.from_json(made.to_json()) == made, "another calibration after to_json"
        return
    for index, layer in enumerate(made.layers):
        assert max(made.get_mask_sizes(1, index)) < 1 << 63, "mask sizes beyond int64"
        if getattr(layer, "store", None) is not None:
            keys, values = layer.decode()
            assert keys.shape[-2] == values.shape[-2] == layer.length
    again = path.with_name("again")
    made.save(again)
    MixKVQCache.load(again).batch_repeat_interleave(1)


# ---- mutations -----------------------------------------------------------------------------------------------------
def _bytes(draw: random.Random, data: bytes) -> bytes:
    """Truncated, lengthened, flipped, overwritten, shuffled."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(out)) if draw.random() < 0.3 else draw.randrange(min(len(out), 4000))
        n = draw.choice((1, 2, 8, 64, 1000))
        match draw.randrange(7):
            case 0:
                del out[at:]
            case 1:
                out += bytes(n)
            case 2:
                out[at] ^= 1 << draw.randrange(8)
            case 3:
                out[at : at + n] = draw.randbytes(n)
            case 4:
                del out[at : at + n]
            case 5:
                out[at:at] = out[: n * 4]
            case 6:
                out[:8] = draw.choice((0, 1, 2, 1 << 22, 1 << 40, (1 << 64) - 1, len(out))).to_bytes(8, "little")
        if not out:
            break
    return bytes(out)


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON tree."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        found += [(node, key) for key in keys]
        todo += [node[key] for key in keys]
    return found


def _tree(draw: random.Random, tree: Any) -> None:
    """Replace, remove, rename, swap, nudge or nest something."""
    nodes = _nodes(tree)
    if not nodes:
        return
    node, key = draw.choice(nodes)
    match draw.randrange(8):
        case 0:
            del node[key]
        case 1:
            other, name = draw.choice(nodes)
            node[key] = copy.deepcopy(other[name])
        case 2 if isinstance(node, dict):
            node[draw.choice(("", "x", "0", "-1", "keys", "layers", "map", "tensor", key + " "))] = node[key]
        case 3 if isinstance(node[key], int):
            node[key] += draw.choice((-1, 1, 64, 1 << 33))
        case 4:
            for _ in range(draw.choice((1, 3, 200))):
                node[key] = [node[key]] if draw.random() < 0.5 else {"x": node[key]}
        case 5 if isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        case _:
            node[key] = copy.deepcopy(draw.choice(HOSTILE))


def _text(draw: random.Random, text: str) -> str:
    """The same on the level of characters: names given twice, numbers that are none, depth, size."""
    at = draw.randrange(len(text) + 1)
    match draw.randrange(5):
        case 0:
            return text[:at] + draw.choice(TEXTS) + text[at + draw.choice((0, 1, 5)) :]
        case 1:
            return text[:at]
        case 2:
            twice = f'"{draw.choice(("version", "layers", "configs", "x"))}":0,'
            return text.replace("{", "{" + twice * draw.choice((1, 2)), 1)
        case 3:
            many = ",".join(f'"n{i}":0' for i in range(draw.choice((10, 1000, 40_000))))
            return text.replace("{", "{" + many + ',"n0":1,', draw.choice((0, 1)))
        case _:
            begin = draw.randrange(len(text) + 1)
            return text[:at] + text[begin : begin + 50] + text[at:]


def _tensors(draw: random.Random, tensors: dict[str, np.ndarray]) -> None:
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    match draw.randrange(8):
        case 0:
            tensors[name] = tensor[: len(tensor) // 2] if tensor.ndim else tensor
        case 1:
            tensors[name] = tensor.reshape(-1)
        case 2:
            del tensors[name]
        case 3:
            tensors[draw.choice(sorted(tensors))] = tensor
        case 4:
            tensors[name] = tensor.view(np.uint8)
        case 5:
            tensor[...] = draw.choice((0, 1, 255, 2))
        case _ if tensor.size:
            flat = tensor.reshape(-1).view(np.uint8)
            for _ in range(draw.choice((1, 1, 3, 30))):  # mostly the first bytes: of records, their headers
                flat[draw.randrange(min(len(flat), draw.choice((40, 400, len(flat)))))] = draw.choice(
                    (0, 1, 2, 64, 127, 128, 255, draw.randrange(256))
                )


def _hollow(draw: random.Random, file: CacheFile) -> dict[str, Any]:
    """A header in which a few tensors have no numbers, and any sizes."""
    shape = [draw.choice(SIZES) for _ in range(draw.choice((1, 2, 3, 4, 4, 4, 5, 8)))] + [0]
    draw.shuffle(shape)
    names = draw.sample(sorted(file.tensors), draw.choice((1, 2, 4)))
    if draw.random() < 0.5:  # keys and values of one layer
        names = [name for name in file.tensors if name.rpartition(".")[2] in ("k", "v")]
    for name in names:
        file.tensors[name] = file.tensors[name].reshape(-1)[:0]
    header = file.header()
    for name in names:
        header[name]["shape"] = shape
    return header


def cache_file(base: Path, made: Path, draw: random.Random) -> None:
    """Write a mutated cache; what has not been damaged as bytes has a right checksum."""
    kind = draw.randrange(9)
    if kind == 0:
        made.write_bytes(_bytes(draw, base.read_bytes()))
        return
    file = CacheFile(base)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if kind < 4:
            _tree(draw, file.about)
        elif kind == 4 and file.tensors:
            _tensors(draw, file.tensors)
    text, header = json.dumps(file.about), None
    if kind == 5:
        text = _text(draw, text)
    elif kind == 6:
        header = file.header()
        _tree(draw, header)
    elif kind == 7:
        _tree(draw, file.metadata)
        if file.tensors:
            _tensors(draw, file.tensors)
    elif kind == 8:
        header = _hollow(draw, file)
    file.write(made, text, header)


def calibration_file(made: Path, draw: random.Random) -> None:
    """Write a mutated calibration."""
    tree = copy.deepcopy(CALIBRATION)
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        _tree(draw, tree)
    text = json.dumps(tree)
    for _ in range(draw.choice((0, 0, 1, 1, 3))):
        text = _text(draw, text)
    data = text.encode(errors="surrogatepass")
    made.write_bytes(_bytes(draw, data) if draw.random() < 0.2 and data else data)


# ---- the loop ------------------------------------------------------------------------------------------------------
def fuzz(seconds: float, seed: int, found: Path) -> int:
    """Mutate until the time is over; returns the number of findings, whose files are kept."""
    outcomes: Counter[str] = Counter()
    findings, runs, end = 0, 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = save_one(folder / "base"), save_plain(folder / "plain")
        for base in bases:
            MixKVQCache.load(base)
        while time.monotonic() < end and findings < 20:
            draw = random.Random(f"{seed} {runs}")
            made = folder / ("made.json" if runs % 3 == 0 else "made.safetensors")
            try:
                if made.suffix == ".json":
                    calibration_file(made, draw)
                else:
                    cache_file(draw.choice(bases), made, draw)
            except (TypeError, ValueError, OverflowError, AttributeError, KeyError):
                continue  # no file can hold it
            finally:
                runs += 1
            try:
                outcomes[f"{made.suffix[1:]} {load(made)}"] += 1
            except Finding as finding:
                findings += 1
                kept = found / f"files-{seed}-{runs - 1}{made.suffix}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(made.read_bytes())
                print(f"{kept}: {finding!s:.300}", flush=True)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
    print(f"files: {outcomes.total() + findings} executions ({counts}), {findings} findings")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", type=Path, default=Path("build/fuzz"))
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args()
    if not given.files:
        return 1 if fuzz(given.seconds, given.seed, given.found) else 0
    for path in given.files:
        print(f"{path}: {load(path)}")
    print(f"{len(given.files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
