"""Loading files of others: what the interpreter does meanwhile, how much memory and time they get (SECURITY.md)."""

from __future__ import annotations

import json
import subprocess
import sys
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


EMOJI = '["😀",' + many('{"":' * 200 + "0" + "}" * 200, 1000)[1:]  # with it all text has four bytes a character
NAMES = ",".join(f'"{number}":0' for number in range(100_000))
COUNTS = {
    "configurations": {"configs": many("{}", 350_000)},
    "configurations of layers": {"layer_configs": "{" + NAMES + "}"},
    "layers": {"layers": many('{"class":"LinearAttentionLayer","attributes":{}}', 20_000)},
    "empty layers": {"layers": many("{}", 350_000)},
    "lists": {"x": many("[]", 350_000)},
    "objects": {"x": many('{"":0}', 140_000)},
    "nested objects with an emoji": {"x": EMOJI},
    "numbers": {"x": many("300", 260_000)},
    "texts": {"x": many('"é"', 200_000)},
    "depth": {"x": "[" * 500_000 + "]" * 500_000},
    "digits": {"x": "9" * 1_000_000},
    "name given twice": {"x": "{" + NAMES + ',"99999":1}'},
    "long name given twice": {"x": '{"' + "a" * 500_000 + '":1,"' + "a" * 500_000 + '":1}'},
    "escapes": {"x": '"' + "\\ud83d\\ude00" * 80_000 + '"'},
}
"""About 1 MB of JSON each, made to become as much as possible."""
SHARE, SECONDS = 48, 20

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
for path in paths:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began, said = peak(), time.process_time(), ""
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    print(Path(path).name, peak() - before, os.path.getsize(path), time.process_time() - began, len(said), sep=";")
"""


def measured(kind: str, good: Path, folder: Path) -> dict[str, tuple[int, ...]]:
    """Bytes at the peak, of the file, seconds, characters of the error, of each file in a folder."""
    command = [sys.executable, "-c", MEASURED, kind, good, *sorted(folder.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, env=own_path())
    assert done.returncode == 0, done.stderr
    rows = [line.split(";") for line in done.stdout.splitlines()]
    return {name: tuple(map(float, numbers)) for name, *numbers in rows}


def assert_justified(found: dict[str, tuple[int, ...]]) -> None:
    for name, (peak, size, seconds, characters) in found.items():
        assert size > 500_000 and peak <= SHARE * size, f"{name}: {peak:,} bytes for a file of {size:,}"
        assert seconds < SECONDS, f"{name}: {seconds} s"
        assert characters < 2000, f"{name}: an error of {characters} characters"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_cache_file_gets_memory_and_time_by_its_size(saved, tmp_path):
    """Text at most `SHARE` bytes for each of its own, whatever it says."""
    file, about = CacheFile(saved), CacheFile(saved).about
    for name, changes in COUNTS.items():
        kept = json.dumps({key: value for key, value in about.items() if key not in changes})[:-1]
        text = kept + "".join(f',"{key}":{value}' for key, value in changes.items()) + "}"
        file.write(tmp_path / name, cache=text)
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    file.write(tmp_path / "tensors", header={**file.header(), **{f"t{n}": empty for n in range(18_000)}})
    found = measured("MixKVQCache", saved, tmp_path)
    assert found.keys() == {*COUNTS, "tensors"}
    assert_justified(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_calibration_gets_memory_and_time_by_its_size(tmp_path):
    (tmp_path / "good").write_text(CALIBRATION)
    folder = tmp_path / "hostile"
    folder.mkdir()
    data: dict[str, Any] = json.loads(CALIBRATION)
    texts = {
        "layers": "{" + ",".join(f'"{n}":{{"value_bits":2}}' for n in range(40_000)) + "}",
        "empty layers": "{" + ",".join(f'"{n}":{{}}' for n in range(90_000)) + "}",
        "fields": "{" + NAMES[:900_000].rpartition(",")[0] + "}",
        "name given twice": "{" + NAMES[:900_000].rpartition(",")[0] + ',"0":1}',
        "summary": '{"x":' + many("[]", 340_000) + "}",
        "nested objects with an emoji": '{"x":' + EMOJI + "}",
    }
    for name, text in texts.items():
        entry = {"empty layers": "layers", "name given twice": "summary"}.get(name, name)
        kept = json.dumps({key: value for key, value in data.items() if key != entry})[:-1]
        (folder / name).write_text(f'{kept},"{entry}":{text}}}')
    found = measured("Calibration", tmp_path / "good", folder)
    assert found.keys() == texts.keys()
    assert_justified(found)


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
