"""A disk that is full or cannot be written: the old file stays, nothing is left beside it, the error names the path."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from models import forward, lossless, prompts, tiny

from mixkvq import MixKVQCache


@pytest.fixture(scope="module")
def cache() -> MixKVQCache:
    filled = lossless()
    forward(tiny("llama"), filled, prompts([140])["input_ids"])
    return filled


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full(cache, small_disk):
    path = small_disk / "c"
    short = cache.fork(1)[0]
    short.batch_select_indices(torch.tensor([0]))
    short.crop(-130)
    short.save(path)
    old = path.read_bytes()
    for _ in range(2):
        with pytest.raises(OSError, match="the cache cannot be saved: No space left on device") as error:
            cache.save(path)
        assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
        assert path.read_bytes() == old and os.listdir(small_disk) == ["c"]
    assert MixKVQCache.load(path).get_seq_length() == 10
    short.save(path)
    assert path.read_bytes() == old


@pytest.mark.parametrize("name", ["漢" * 84 + "abc", "é" * 127, "a" * 255, "\udcff" * 255, "漢"], ids=ascii)
def test_any_name_that_a_file_can_have(cache, tmp_path, name):
    """255 bytes at most, whatever the characters; the temporary file's is no longer."""
    path = tmp_path / name
    try:
        path.write_bytes(b"old")
    except OSError as error:
        pytest.skip(f"this file system has no such name: {error.strerror}")
    cache.save(path)
    assert os.listdir(tmp_path) == [name]
    assert MixKVQCache.load(path).get_seq_length() == 140


SAVE = """
import os, sys
from mixkvq import MixKVQCache

cache = MixKVQCache.load(sys.argv[1])
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)  # root may write anywhere
try:
    cache.save(sys.argv[2])
except OSError as error:
    print(type(error).__name__, error.filename)
"""


def test_a_folder_that_cannot_be_written(cache, tmp_path):
    folder, source = tmp_path / "closed", tmp_path / "source"
    folder.mkdir()
    path = folder / "c"
    path.write_bytes(b"old")
    cache.save(source)
    folder.chmod(0o555)
    above = (tmp_path, *tmp_path.parents) if os.getuid() == 0 else ()  # nobody must get as far as the folder
    closed = {each: mode for each in above if not (mode := each.stat().st_mode) & 0o001}
    command = [sys.executable, "-P", "-c", SAVE, source, path]
    try:
        for each, mode in closed.items():
            each.chmod(mode | 0o011)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        for each, mode in closed.items():
            each.chmod(mode)
        folder.chmod(0o755)
    assert (done.stdout, done.stderr) == (f"PermissionError {path}\n", "")
    assert path.read_bytes() == b"old" and os.listdir(folder) == ["c"]
