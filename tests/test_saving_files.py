"""Files of saved caches: damaged, foreign, newer, hostile."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_file import SHORT, CacheFile, own_path, save_one, save_plain
from models import forward, prompts, tiny

from mixkvq import MixKVQCache, compat, tensorfile
from mixkvq.errors import CacheFileError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved cache of a sliding and a packed layer, two rows, one padded."""
    return save_one(tmp_path_factory.mktemp("saved") / "cache.safetensors")


def refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(CacheFileError, match=match) as error:
        MixKVQCache.load(path)
    assert str(path) in str(error.value)


# ---- damage --------------------------------------------------------------------------------------------------------
def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_every_flipped_bit_is_found(saved, tmp_path):
    """Of the length of the header, the header, every tensor, and places drawn at random."""
    data, draw, file = saved.read_bytes(), random.Random(0), CacheFile(saved)
    end = header_end(data)
    places = [*range(8), *range(8, end, 11), *(draw.randrange(len(data)) for _ in range(300))]
    at = end
    for tensor in sorted(file.header().values(), key=lambda entry: entry["data_offsets"]):
        size = tensor["data_offsets"][1] - tensor["data_offsets"][0]
        places += [at, at + size // 2, at + size - 1] if size else []
        at += size
    bad = tmp_path / "bad"
    for place in places:
        for bit in range(8) if place < 8 else [draw.randrange(8)]:
            bad.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            refused(bad)


def test_truncated_and_lengthened_files(saved, tmp_path):
    data, draw = saved.read_bytes(), random.Random(1)
    end = header_end(data)
    lengths = [
        0,
        1,
        7,
        8,
        9,
        100,
        end - 1,
        end,
        end + 1,
        len(data) - 1,
        *(draw.randrange(len(data)) for _ in range(50)),
    ]
    for length in lengths:
        (tmp_path / "short").write_bytes(data[:length])
        refused(tmp_path / "short", "is empty" if length == 0 else "no safetensors" if length < 8 else "is truncated")
    (tmp_path / "long").write_bytes(data + b"\0")
    refused(tmp_path / "long", "has bytes behind its end")


def test_foreign_files(saved, tmp_path):
    weights, tensors = tmp_path / "model.safetensors", {"model.embed_tokens.weight": torch.zeros(3, 4)}
    pytest.importorskip("safetensors.torch").save_file(tensors, weights, {"format": "pt"})
    refused(weights, r"something else than a MixKVQCache \(it has tensors such as 'model.embed_tokens.weight'\)")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for content in (b"Hello, world! " * 100, bytes(1000), b"\xff" * 1000, pickle.dumps(Bomb())):
        (tmp_path / "foreign").write_bytes(content)
        refused(tmp_path / "foreign", "is no safetensors file")
    torch.save(Bomb(), tmp_path / "foreign")
    refused(tmp_path / "foreign", "is no safetensors file")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "version, match", [("2", "newer mixkvq: upgrade"), ("0", "save the cache again"), ("x", "'x'")]
)
def test_other_versions(saved, tmp_path, version, match):
    file = CacheFile(saved)
    file.metadata["version"] = version
    refused(file.write(tmp_path / "c"), match)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        MixKVQCache.load(tmp_path / "nothing")
    with pytest.raises(OSError, match="not a regular file"):
        MixKVQCache.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            MixKVQCache.load(path)


# ---- malice: right checksums, wrong contents -----------------------------------------------------------------------
def packed(file: CacheFile) -> dict:
    return file.about["layers"][1]


def sliding(file: CacheFile) -> dict:
    return file.about["layers"][0]["attributes"]


def config(file: CacheFile) -> dict:
    return file.about["configs"][0]


def tensor(name: str, change):
    """A change of a tensor of the packed layer; what it returns, if anything, takes its place."""

    def changed(file: CacheFile) -> None:
        name_ = f"layers.1.{name}"
        new = change(file.tensors[name_])
        if new is not None:
            file.tensors[name_] = new

    return changed


def setting(where, name, value):
    return lambda file: where(file).__setitem__(name, value)


def filling(value):
    return lambda array: array.__setitem__(..., value)


def at(index, value):
    return lambda array: array.__setitem__(index, value)


HUGE = 10**12
HOSTILE = {
    "length": setting(packed, "length", HUGE),
    "length below zero": setting(packed, "length", -1),
    "length of another type": setting(packed, "length", 90.0),
    "length true": setting(packed, "length", True),
    "residual_length": setting(config, "residual_length", 10),
    "sink_length": setting(config, "sink_length", HUGE),
    "sink_length 60": setting(config, "sink_length", 60),
    "block_length": setting(config, "block_length", 64),
    "block_length huge": setting(config, "block_length", HUGE),
    "key_group_size": lambda file: config(file).update(block_length=64, residual_length=64, key_group_size=64),
    "value_bits": setting(config, "value_bits", 4),
    "allocate": setting(config, "allocate", "exact"),
    "reference": setting(config, "key_reference", "none"),
    "salience": setting(config, "salience", "none"),
    "unknown field": setting(config, "x", 1),
    "no config": lambda file: file.about["configs"].clear(),
    "config number": setting(packed, "config", 7),
    "configs": lambda file: file.about.update(configs={}),
    "precision": lambda file: file.about.update(precision="sloppy"),
    "learned": lambda file: file.about.update(learned=1),
    "layers": lambda file: file.about.update(layers=3),
    "no layers": lambda file: file.about.pop("layers"),
    "one layer": lambda file: file.about["layers"].pop(),
    "another layer": lambda file: file.about["layers"].append(packed(file)),
    **{
        f"layer_configs {index!r}": lambda file, index=index: file.about.update(layer_configs={index: 0})
        for index in ("x", "", "-5", " 3", "1_0", "01", "+1", "\u0663")
    },
    "half a character": lambda file: file.about.update(model={"fingerprint": "\ud800", "fields": {}}),
    "calibration": lambda file: file.about.update(calibration={"name": "default", "json": "{}"}),
    "model": lambda file: file.about.update(model={"fingerprint": 1, "fields": {}}),
    "model without fields": lambda file: file.about.update(model={"fingerprint": "x"}),
    "mode plain": setting(packed, "mode", "plain"),
    "mode native": setting(packed, "mode", "native"),
    "mode list": setting(packed, "mode", ["packed"]),
    "dtype": setting(packed, "dtype", "F31"),
    "dtypes": setting(packed, "dtypes", ["F16", "F16"]),
    "three dtypes": setting(packed, "dtypes", ["F32"] * 3),
    "reason": setting(packed, "decoded_for", ["x" * 100_000, "y"]),
    "reason of one": setting(packed, "decoded_for", ["x"]),
    "counter": setting(packed, "dequantizations", 1 << 70),
    "query_count": setting(packed, "query_count", -1),
    "raised": setting(packed, "raised", "1"),
    "class": setting(packed, "class", "OrderedDict"),
    "class of ours": setting(packed, "class", "MixKVQCache"),
    "hybrid": setting(packed, "class", "MixKVQHybridLayer"),
    "place far": tensor("place", filling(HUGE)),
    "place in another slab": tensor("place", at((0, 0, 0), 1 << 40)),
    "place between": tensor("place", at((0, 0, 0), 32)),
    "place twice": tensor("place", lambda t: filling(0)(t)),
    "place below": tensor("place", at((0, 0, 0), -2)),
    "place short": tensor("place", lambda t: t[:, :1].copy()),
    "blocks": tensor("blocks", filling(HUGE)),
    "blocks below": tensor("blocks", filling(-1)),
    "no blocks": tensor("blocks", filling(0)),
    "exact": tensor("exact", filling(HUGE)),
    "exact below": tensor("exact", filling(-40)),
    "start": tensor("start", filling(-1)),
    "start far": tensor("start", filling(HUGE)),
    "start and exact": lambda file: [tensor("start", at(0, 1))(file), tensor("exact", at(0, 0))(file)],
    "rows": tensor("exact", lambda t: t[:1].copy()),
    "k longer": tensor("k", lambda t: t.repeat(2, 2)),
    "k shorter": tensor("k", lambda t: t[:, :, :3].copy()),
    "k flat": tensor("k", lambda t: t.reshape(-1)),
    "k of another dtype": tensor("k", lambda t: t.astype("float16")),
    "k of integers": tensor("k", lambda t: t.astype("int64")),
    "v": tensor("v", lambda t: t[:, :1].copy()),
    "heads": lambda file: [tensor(n, lambda t: t.repeat(2, 1))(file) for n in ("k", "v")],
    "records longer": tensor("records", lambda t: t.repeat(2)),
    "records shorter": tensor("records", lambda t: t[:-64].copy()),
    "no records": tensor("records", lambda t: t[:0].copy()),
    "records in rows": tensor("records", lambda t: t.reshape(1, -1)),
    "records of another dtype": tensor("records", lambda t: t.view("int64")),
    "mu": tensor("mu", filling(float("inf"))),
    "has_mu": tensor("has_mu", filling(0)),
    "has_mu 2": tensor("has_mu", filling(2)),
    "query_sum": tensor("query_sum", lambda t: t[:, :, :8].copy()),
    "query_counts": tensor("query_count", filling(-5)),
    **{
        f"no {n}": lambda file, n=n: file.tensors.pop(f"layers.1.{n}")
        for n in ("k", "exact", "records", "mu", "query_sum")
    },
    "one more tensor": lambda file: file.tensors.update(x=file.tensors["layers.1.exact"]),
    "window": setting(sliding, "sliding_window", HUGE),
    "window below": setting(sliding, "sliding_window", -1),
    "window text": setting(sliding, "sliding_window", "48"),
    "seen": setting(sliding, "cumulative_length", 3),
    "seen beyond int64": setting(sliding, "cumulative_length", 10**30),
    "values of integers": lambda file: file.tensors.update(
        {"layers.0.values": file.tensors["layers.0.values"].astype("int64")}
    ),
    "not initialized": setting(sliding, "is_initialized", False),
    "keys alone": setting(sliding, "values", None),
    "keys twice": setting(sliding, "values", {"tensor": "layers.0.keys"}),
    "keys text": setting(sliding, "keys", "x"),
    "another's keys": setting(sliding, "keys", {"tensor": "layers.1.k"}),
    "attribute": setting(sliding, "update", 1),
    "special attribute": setting(sliding, "__class__", 1),
    "list": setting(sliding, "keys", [1]),
    "kind": setting(sliding, "keys", {"object": "x"}),
    "two kinds": setting(sliding, "keys", {"tensor": "x", "dtype": "F32"}),
    "map": setting(sliding, "keys", {"map": [["a", 1]]}),
}


@pytest.fixture(scope="module")
def hostile(saved, tmp_path_factory):
    """A folder with all hostile files."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, change in HOSTILE.items():
        file = CacheFile(saved)
        change(file)
        file.write(folder / name)
    return folder


def test_a_file_put_together_again_is_the_same_cache(saved, tmp_path):
    again = CacheFile(saved).write(tmp_path / "c")
    MixKVQCache.load(again).save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_contents_are_refused(hostile, name):
    refused(hostile / name, "has a right checksum, but is no cache")


LIMITED = """
import resource, sys
from pathlib import Path
from mixkvq import MixKVQCache
from mixkvq.errors import CacheFileError
MixKVQCache.load(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[2]).iterdir()):
    try:
        MixKVQCache.load(path)
    except CacheFileError as error:
        print(path.name if "MemoryError" not in str(error) else error)
"""


@pytest.mark.slow
def test_hostile_contents_get_no_memory(saved, hostile):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, saved, hostile], capture_output=True, text=True, env=own_path()
    )
    assert sorted(done.stdout.splitlines()) == sorted(HOSTILE), done.stderr


def states(file: CacheFile) -> dict:
    return file.about["layers"][0]["states"]


def by_state(name, value):
    return lambda file: states(file).update({name: {"map": [[0, value]]}})


LINEAR = {
    "number_of_states": setting(states, "number_of_states", HUGE),
    "no states": setting(states, "number_of_states", 0),
    "conv_kernel_size": by_state("conv_kernel_size", HUGE),
    "conv_kernel_size text": by_state("conv_kernel_size", "4"),
    "conv_kernel_size bare": setting(states, "conv_kernel_size", 4),
    "has_previous_state": by_state("has_previous_state", 1),
    "conv_states": by_state("conv_states", 7),
    "no conv_states": by_state("conv_states", None),
    "is_conv_states_initialized": by_state("is_conv_states_initialized", False),
    "attribute": setting(states, "_k", 7),
    "another attribute": setting(states, "ledger", 7),
    "layer": lambda file: file.about["layers"][0].update({"class": "LinearAttentionLayer"}),
}


@pytest.mark.skipif(compat.VERSION < (5, 14), reason="layers have one linear state each before transformers 5.14")
@pytest.mark.parametrize("name", LINEAR)
def test_hostile_linear_states_are_refused(tmp_path, name):
    cache = MixKVQCache(**SHORT)
    forward(tiny("falcon_h1"), cache, prompts([40])["input_ids"])
    cache.save(tmp_path / "c")
    file = CacheFile(tmp_path / "c")
    LINEAR[name](file)
    refused(file.write(tmp_path / "c"), "has a right checksum, but is no cache")


def test_devices(saved):
    absent = () if torch.cuda.is_available() else ("cuda",)
    for device in ("meta", "nowhere", None, *absent):
        with pytest.raises(ValueError, match=f"device is '?{device}'?, must be"):
            MixKVQCache.load(saved, device=device)


@pytest.mark.parametrize("path, error", [(7, TypeError), (b"c", TypeError), ("", ValueError), ("a\0b", ValueError)])
def test_paths(path, error):
    with pytest.raises(error, match=r"path is .*, must"):
        MixKVQCache.load(path)
    with pytest.raises(error, match=r"path is .*, must"):
        MixKVQCache().save(path)


def test_hostile_text(saved, tmp_path):
    file, path = CacheFile(saved), tmp_path / "c"
    for text in ("", "[]", "{}", "7", "[" * 100_000, '{"a": 1, "a": 2}', "NaN", "9" * 5000, '{"layers": NaN}'):
        refused(file.write(path, cache=text), "is no cache")
    name, entry = next(iter(file.header().items()))
    for shape in ([-1], [1 << 60, 0], "x", [2.0], [1] * 9, 2):
        refused(file.write(path, header={**file.header(), name: {**entry, "shape": shape}}), "damaged")
    refused(file.write(path, header={**file.header(), name: {**entry, "data_offsets": [0]}}), "damaged")
    refused(file.write(path, header={**file.header(), name: {**entry, "dtype": 3}}), "is no cache")
    overlapping = {**file.header(), "x": entry}
    refused(file.write(path, header=overlapping), "does not begin at")
    huge = {**entry, "shape": [1 << 40], "data_offsets": [0, 8 << 40]}
    refused(file.write(path, header={name: {**huge, "dtype": "I64"}}), "is truncated")
    for shape in ([0, (1 << 48) - 1, (1 << 48) - 1], [1 << 47, 1 << 47, 0], [0] + [3000] * 7):
        without = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        refused(file.write(path, header={"x": without, **file.header()}), "damaged.*'x' has no numbers")
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(path, "no safetensors file")
    path.write_bytes((tensorfile.MAX_HEADER + 1).to_bytes(8, "little") + b" " * (tensorfile.MAX_HEADER + 1))
    refused(path, "no safetensors file")


@pytest.mark.parametrize("text", ["\ud800", "\udfff", "x\ud83d", "\ud83d\\ude00", "\ud83d \ude00", "\ud800" * 64])
@pytest.mark.parametrize("where", ["checksum", "version", "format", "preset", "model", "x"])
def test_half_a_character_anywhere(saved, tmp_path, where, text):
    file = CacheFile(saved)
    file.metadata[where] = text
    refused(file.write(tmp_path / "c"), "half a character")
    file.metadata[where] = file.metadata["preset"] = "😀é\\ud800"
    if where not in ("preset", "model", "x"):
        refused(file.write(tmp_path / "c"))
    else:  # which says the same to everybody: a whole one, and what only looks like half
        MixKVQCache.load(file.write(tmp_path / "c"))


@pytest.mark.parametrize("checksum", [None, "", "0" * 63, "0" * 64 + " ", "é" * 32, "F" * 64, "f" * 64])
def test_checksums_that_are_none(saved, tmp_path, checksum):
    file = CacheFile(saved)
    file.metadata["checksum"] = checksum
    if checksum is None:
        del file.metadata["checksum"]
    refused(file.write(tmp_path / "c"), "not that of its content" if checksum == "f" * 64 else "checksum is missing")


# ---- tensors without numbers ---------------------------------------------------------------------------------------
def hollow(path: Path, shape: list[int], *, mode: str) -> Path:
    """A cache that holds keys and values of this shape, none at all."""
    file = CacheFile(save_plain(path))
    for layer in file.about["layers"]:
        layer.update(mode=mode, reason=["x", "y"])
    file.tensors = {
        name: tensor.reshape(-1)[:0] for name, tensor in file.tensors.items() if name.rpartition(".")[2] in ("k", "v")
    }
    assert len(file.tensors) == 4
    return file.write(path, header={name: {**entry, "shape": shape} for name, entry in file.header().items()})


@pytest.mark.parametrize("mode", ["plain", "native"])
@pytest.mark.parametrize(
    "shape", [[1 << 40, 0, 20, 16], [1 << 40, 20, 20, 0], [0, 1 << 40, 20, 16], [0, 2, 20, 1 << 40]]
)
def test_sizes_that_no_number_shows_are_not_believed(tmp_path, shape, mode):
    refused(hollow(tmp_path / "c", shape, mode=mode), "has no numbers")


@pytest.mark.parametrize("mode", ["plain", "native"])
@pytest.mark.parametrize("shape", [[1000, 0, 20, 16], [1, 2, 20, 0], [1000, 2, 20, 0]])
def test_rows_of_nothing_are_refused(tmp_path, shape, mode):
    refused(hollow(tmp_path / "c", shape, mode=mode), "rows of keys .*, which hold nothing")


def test_a_window_with_values_narrower_than_its_keys_is_loaded(saved, tmp_path):
    """As autocast leaves them."""
    file = CacheFile(saved)
    file.tensors["layers.0.values"] = file.tensors["layers.0.values"].astype("float16")
    layer = MixKVQCache.load(file.write(tmp_path / "c")).layers[0]
    assert (layer.keys.dtype, layer.values.dtype) == (torch.float32, torch.float16)


EMPTY = {
    "nothing": (lambda cache: cache.reset(), "gemma3", 90),
    "no tokens": (lambda cache: cache.crop(-20), "gemma3", 20),
    "no rows": (lambda cache: cache.batch_select_indices(torch.tensor([], dtype=torch.long)), "gemma3", 5),
}


@pytest.mark.parametrize("name", EMPTY)
def test_caches_without_numbers_are_saved_and_loaded(tmp_path, name):
    """What is cropped to nothing keeps its rows and heads in a sliding window; what lost its rows, its tokens."""
    change, family, tokens = EMPTY[name]
    cache = MixKVQCache(config=tiny(family).config, **SHORT)
    forward(tiny(family), cache, prompts([tokens])["input_ids"])
    change(cache)
    cache.save(tmp_path / "c")
    again = MixKVQCache.load(tmp_path / "c")
    for layer, other in zip(cache.layers, again.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length()
        assert (layer.keys is None) is (other.keys is None)
        assert layer.keys is None or layer.keys.shape == other.keys.shape
    again.save(tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == (tmp_path / "c").read_bytes()
    if name != "no rows":
        want, got = (forward(tiny(family), each, prompts([7])["input_ids"]) for each in (cache, again))
        assert torch.equal(want, got)


def test_sizes_that_would_not_be_believed_are_not_written(tmp_path):
    entry = tensorfile.Entry.of(torch.empty(0, 5000, 16))
    with pytest.raises(ValueError, match=r"no numbers in x, whose sizes are \[0, 5000, 16\]"):
        tensorfile.write(tmp_path / "c", {}, {"x": entry})
    tensorfile.write(tmp_path / "c", {}, {"x": entry, "y": tensorfile.Entry.of(torch.zeros(5000, dtype=torch.uint8))})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(("value", "what"), [(float("inf"), "Infinity"), ("\ud800", "half a character")])
def test_what_could_not_be_loaded_is_not_saved(saved, tmp_path, value, what):
    cache = MixKVQCache.load(saved)
    fields = {**cache.model_record.fields, "rope_theta": value}
    cache.model_record = dataclasses.replace(cache.model_record, fields=fields)
    with pytest.raises(ValueError, match=f"cannot be saved, as it could not be loaded: .*{what}"):
        cache.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_cache_of_more_layers_than_a_file_has_is_not_saved(tmp_path):
    cache = MixKVQCache()
    cache.update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), 4096)
    with pytest.raises(ValueError, match="cannot be saved: it has 4097 layers, a file has 4096 at most"):
        cache.save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_differences_of_models_are_told_in_few_words(saved, tmp_path):
    """However many a file claims, and whatever they are called."""
    file = CacheFile(saved)
    file.about["model"]["fields"] |= {f"\033[31m{n}\n": n for n in range(10_000)}
    with pytest.raises(CacheFileError, match=r"and 99\d\d more") as caught:
        MixKVQCache.load(file.write(tmp_path / "c"), config=tiny().config)
    assert len(str(caught.value)) < 4000 and str(caught.value).isprintable()


def test_a_full_stack_is_not_blamed_on_the_file(saved):
    def deep(frames):
        return MixKVQCache.load(saved) if frames == 0 else deep(frames - 1)

    errors = set()
    for frames in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit(), 2):
        try:
            deep(frames)
        except BaseException as error:
            errors.add(type(error))
    assert errors == {RecursionError}


def test_records_that_were_tampered_with_are_refused_or_harmless(saved, tmp_path):
    """Every byte of a record's header and channel map in turn: the kernels never get what they cannot read."""
    path, kept = tmp_path / "c", 0
    for byte in range(32 + 6):
        for value in (0, 1, 0x7F, 0xFF):
            file = CacheFile(saved)
            records = file.tensors["layers.1.records"]
            if records[byte] == value:
                continue
            records[byte] = value
            try:
                cache = MixKVQCache.load(file.write(path))
            except CacheFileError:
                continue
            kept += 1
            keys, values = cache.layers[1].decode()
            assert keys.shape == values.shape == (2, 2, 90, 16)
    assert 0 < kept < 60, "bounds of scales, and maps with as many channels of each kind"
