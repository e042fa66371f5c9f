"""Loading files of others: what the interpreter does meanwhile, how much memory and time they get (SECURITY.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache_file import CacheFile, own_path, save_one
from test_saving_files import HOSTILE

from mixkvq import MixKVQCache
from mixkvq.calibration import MAX_LAYERS, Calibration
from mixkvq.config import MixKVQConfig
from mixkvq.errors import CacheFileError

CALIBRATION = Calibration("x", "default", {"value_bits": 4}, {1: {"value_bits": 2}}).to_json()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_one(tmp_path_factory.mktemp("saved") / "cache.safetensors")


# ---- what happens --------------------------------------------------------------------------------------------------
AUDITED = """
import os, sys
from pathlib import Path
from mixkvq import MixKVQCache
from mixkvq.calibration import Calibration

caches, calibrations = (sorted(Path(folder).iterdir()) for folder in sys.argv[1:])


def load():
    for read, paths in ((MixKVQCache.load, caches), (Calibration.load, calibrations)):
        for path in paths:
            try:
                read(path)
                done.append(path.name)
            except ValueError:
                pass


done, seen, watching = [], set(), False


def hook(event, arguments):
    if watching:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        seen.add((event, str(arguments[0]) if event == "open" else repr(arguments), bool(writes)))


sys.addaudithook(hook)
load()  # modules that loading needs
done.clear()
watching = True
load()
watching = False
print(sorted(done))
for event in sorted(seen, key=str):
    print(event)
"""


def test_loading_opens_the_file_for_reading_and_does_nothing_else(saved, tmp_path):
    """No audit event (import, exec, compile, pickle.find_class, ctypes, sockets, processes ...) besides one open."""
    (tmp_path / "caches").mkdir()
    (tmp_path / "calibrations").mkdir()
    (tmp_path / "caches/good").write_bytes(saved.read_bytes())
    for name, change in HOSTILE.items():
        file = CacheFile(saved)
        change(file)
        file.write(tmp_path / "caches" / name.replace("/", "_"))
    (tmp_path / "calibrations/good").write_text(CALIBRATION)
    for number, text in enumerate(("", "{", "[1]", '{"version": 1}', CALIBRATION.replace("default", "__import__"))):
        (tmp_path / f"calibrations/{number}").write_text(text)
    command = [sys.executable, "-c", AUDITED, tmp_path / "caches", tmp_path / "calibrations"]
    done = subprocess.run(command, capture_output=True, text=True, env=own_path())
    loaded, *events = done.stdout.splitlines()
    assert loaded == "['good', 'good']", done.stderr
    files = [path for folder in ("caches", "calibrations") for path in (tmp_path / folder).iterdir()]
    assert sorted(events) == sorted(str(("open", str(path), False)) for path in files)


# ---- memory and time -----------------------------------------------------------------------------------------------
def many(piece: str, count: int) -> str:
    """A list in JSON."""
    return "[" + ",".join([piece] * count) + "]"


def names(count: int, form: str = '"{}":0') -> str:
    """The inside of an object in JSON."""
    return ",".join(map(form.format, range(count)))


def emoji(share: float, opening: str, closing: str, depth: int = 55) -> str:
    """Objects or lists in each other, as deep as is allowed; with an emoji all text has four bytes a character."""
    one = opening * depth + "0" + closing * depth
    return '["😀",' + many(one, int(900_000 * share / (len(one) + 1)))[1:]


def counts(share: float) -> dict[str, dict[str, str]]:
    """About ``share`` MB of JSON each, made to become as much as possible."""
    long = "a" * int(500_000 * share)
    return {
        "configurations": {"configs": many("{}", int(350_000 * share))},
        "configurations of layers": {"layer_configs": "{" + names(int(100_000 * share)) + "}"},
        "layers": {"layers": many('{"class":"LinearAttentionLayer","attributes":{}}', int(20_000 * share))},
        "empty layers": {"layers": many("{}", int(350_000 * share))},
        "lists": {"x": many("[]", int(350_000 * share))},
        "objects": {"x": many('{"":0}', int(140_000 * share))},
        "nested objects with an emoji": {"x": emoji(share, '{"":', "}")},
        "nested lists with an emoji": {"x": emoji(share, "[", "]")},
        "lists with an emoji": {"x": emoji(share, "[", "]", 1)},
        "calibration": {
            "calibration": '{"name":"x","json":' + json.dumps(emoji(share, "[", "]"), ensure_ascii=False) + "}"
        },
        "numbers": {"x": many("300", int(260_000 * share))},
        "texts": {"x": many('"é"', int(200_000 * share))},
        "depth": {"x": "[" * int(500_000 * share) + "]" * int(500_000 * share)},
        "digits": {"x": "9" * int(1_000_000 * share)},
        "name given twice": {"x": "{" + names(int(100_000 * share)) + ',"7":1}'},
        "long name given twice": {"x": f'{{"{long}":1,"{long}":1}}'},
        "escapes": {"x": '"' + "\\ud83d\\ude00" * int(80_000 * share) + '"'},
        "backslashes": {"x": '"' + "\\\\" * int(500_000 * share) + '"'},
    }


def calibrations(share: float) -> dict[str, dict[str, str]]:
    """The same for calibrations."""
    return {
        "layers": {"layers": "{" + names(int(40_000 * share), '"{}":{{"value_bits":2}}') + "}"},
        "empty layers": {"layers": "{" + names(int(90_000 * share), '"{}":{{}}') + "}"},
        "fields": {"fields": "{" + names(int(90_000 * share)) + "}"},
        "name given twice": {"summary": "{" + names(int(90_000 * share)) + ',"0":1}'},
        "summary": {"summary": '{"x":' + many("[]", int(340_000 * share)) + "}"},
        "nested objects with an emoji": {"summary": '{"x":' + emoji(share, '{"":', "}") + "}"},
        "nested lists with an emoji": {"summary": '{"x":' + emoji(share, "[", "]") + "}"},
        "lists with an emoji": {"summary": '{"x":' + emoji(share, "[", "]", 1) + "}"},
    }


def replaced(data: dict[str, Any], changes: dict[str, str]) -> str:
    """JSON with these entries instead."""
    kept = json.dumps({key: value for key, value in data.items() if key not in changes})[:-1]
    return kept + "".join(f',"{key}":{value}' for key, value in changes.items()) + "}"


SHARE, FLOOR = 64, 0.2
"""Bytes of memory for one of the file; seconds that no file is blamed for."""

MEASURED = """
import gc, os, sys, time
from pathlib import Path
from mixkvq import MixKVQCache
from mixkvq.calibration import Calibration


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


kind, good, *paths = sys.argv[1:]
read = getattr(globals()[kind], "load")
read(good)
gc.freeze()  # so that collections walk the objects of a file alone, not those of all modules
for path in paths:
    if child := os.fork():  # a process each: what one file had could be used again for the next
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        continue
    read(good)  # so that the code is there: a new process has none of its pages yet
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, said, seconds = peak(), "", []
    for _ in range(3):
        began = time.process_time()
        try:
            read(path)
        except ValueError as error:
            said = str(error)
        seconds.append(time.process_time() - began)
    print(Path(path).name, peak() - before, os.path.getsize(path), min(seconds), len(said), sep=";", flush=True)
    os._exit(0)
"""


def measured(kind: str, good: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    """Bytes at the peak, of the file, seconds, characters of the error, of each file in a folder."""
    command = [sys.executable, "-c", MEASURED, kind, good, *sorted(folder.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, env=own_path())
    assert done.returncode == 0, done.stderr
    rows = [line.split(";") for line in done.stdout.splitlines()]
    return {name: tuple(map(float, numbers)) for name, *numbers in rows}


def assert_justified(kind: str, good: Path, folder: Path, write: Callable[[Path, float], None]) -> set[str]:
    """What ``write`` writes into a folder, and a quarter of it, is read with memory and time by its size."""
    found = []
    for share in (0.25, 1):
        here = folder / str(share)
        here.mkdir()
        write(here, share)
        found.append(measured(kind, good, here))
    quarter, whole = found
    assert quarter.keys() == whole.keys()
    for name, (peak, size, seconds, characters) in whole.items():
        assert size > 500_000 and peak <= SHARE * size, f"{name}: {peak:,} bytes for a file of {size:,}"
        assert 3 < size / quarter[name][1] < 5, f"{name}: {size:,} bytes are not four times {quarter[name][1]:,}"
        assert seconds < 8 * quarter[name][2] + FLOOR, f"{name}: {seconds} s, {quarter[name][2]} s for a quarter"
        assert characters < 2000, f"{name}: an error of {characters} characters"
    return {*whole}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_cache_file_gets_memory_and_time_by_its_size(saved, tmp_path):
    """Text at most `SHARE` bytes for each of its own, whatever it says."""
    file, about = CacheFile(saved), CacheFile(saved).about
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}

    def write(folder: Path, share: float) -> None:
        for name, changes in counts(share).items():
            file.write(folder / name, cache=replaced(about, changes))
        many = {f"t{n}": empty for n in range(int(18_000 * share))}
        file.write(folder / "tensors", header={**file.header(), **many})

    assert assert_justified("MixKVQCache", saved, tmp_path, write) == {*counts(0), "tensors"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_calibration_gets_memory_and_time_by_its_size(tmp_path):
    (tmp_path / "good").write_text(CALIBRATION)
    data = json.loads(CALIBRATION)

    def write(folder: Path, share: float) -> None:
        for name, changes in calibrations(share).items():
            (folder / name).write_text(replaced(data, changes))

    assert assert_justified("Calibration", tmp_path / "good", tmp_path, write) == {*calibrations(0)}


def test_more_layers_than_a_model_has_are_refused(saved, tmp_path):
    """Each would be a configuration: 2 kB of memory for 2 bytes of JSON."""
    file = CacheFile(saved)
    file.about["configs"] += [{}] * MAX_LAYERS
    with pytest.raises(CacheFileError, match=f"configs are {MAX_LAYERS + 1}, must be {MAX_LAYERS} at most"):
        MixKVQCache.load(file.write(tmp_path / "c"))
    data = json.loads(CALIBRATION)
    for count in (MAX_LAYERS, MAX_LAYERS + 1):
        data["layers"] = {str(n): {} for n in range(count)}
        (tmp_path / "c").write_text(json.dumps(data))
        if count > MAX_LAYERS:
            with pytest.raises(ValueError, match=f"layers has {count} entries, must have {MAX_LAYERS} at most"):
                Calibration.load(tmp_path / "c")
        else:
            assert len(Calibration.load(tmp_path / "c").layer_configs(MixKVQConfig.preset("default"))) == 0
