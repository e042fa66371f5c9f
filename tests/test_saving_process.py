"""Saved caches and other processes: those that read them, and those that end while they write."""

from __future__ import annotations

import errno
import os
import resource
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from answer import PROMPT, answer
from cache_file import SHORT, own_path, save_one
from families import FAMILIES
from models import forward, prompts, tiny

from mixkvq import MixKVQCache, files

EXAMPLE = Path(__file__).parents[1] / "examples" / "prompt_cache.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_one(tmp_path_factory.mktemp("saved") / "cache.safetensors")


# ---- reading -------------------------------------------------------------------------------------------------------
FEW = ["llama.sdpa", "gemma3.sdpa", "gpt_oss.eager", "qwen3_next.sdpa", "jamba.sdpa"]
MORE = ["llama.eager", "mistral.sdpa", "deepseek_v3.sdpa", "falcon_h1.sdpa", "glm_moe_dsa.sdpa", "gemma4.sdpa"]


@pytest.mark.parametrize("names", [FEW, pytest.param([*MORE, "bloom.eager"], marks=pytest.mark.slow)])
def test_a_new_process_answers_with_the_same_tokens_and_logits(names, tmp_path):
    """Bit for bit."""
    wanted = {}
    for name in names:
        family, attention = name.split(".")
        if FAMILIES[family].absent(attention):
            continue
        cache, model = MixKVQCache(**SHORT), tiny(family, attention)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bloom's decoding
            inputs = prompts(PROMPT)
            forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
            cache.save(tmp_path / f"{name}.safetensors")
            wanted[name] = answer(model, cache)
    assert len(wanted) >= 2
    command = [sys.executable, Path(__file__).with_name("answer.py"), *tmp_path.glob("*.safetensors")]
    subprocess.run(command, env=own_path(), check=True)
    for name, want in wanted.items():
        got = torch.load(tmp_path / f"{name}.safetensors.pt")
        assert torch.equal(got["tokens"], want.sequences), name
        assert torch.equal(got["logits"], torch.stack(want.logits)), name


def test_the_example_answers_the_same_from_its_file(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    from cli_fixtures import WORDS, save_tiny_model

    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(WORDS * 20))
    printed = []
    for _ in range(2):
        runpy.run_path(str(EXAMPLE))["main"](str(tmp_path / "text"), "the cat sat|a big dog", str(model))
        printed.append([line for line in capsys.readouterr().out.splitlines() if "[" in line or "->" in line])
    (first, *answers), (second, *again) = printed
    assert "tokens read and saved" in first and "tokens loaded" in second
    assert answers == again and len(answers) == 2 and all(len(line.split()) > 30 for line in answers)


# ---- writing -------------------------------------------------------------------------------------------------------
def test_a_folder_that_is_not_there(saved, tmp_path):
    cache = MixKVQCache.load(saved)
    with pytest.raises(FileNotFoundError, match="cannot be saved"):
        cache.save(tmp_path / "nowhere" / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        cache.save(tmp_path / "file" / "c")
    with pytest.raises(IsADirectoryError):
        cache.save(tmp_path)
    with pytest.raises(OSError, match="not a regular file"):
        cache.save("/dev/null")


def limited(cache: MixKVQCache, path: Path, size: int) -> None:
    """Save where files may have so many bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        cache.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(saved, tmp_path, monkeypatch):
    cache, path = MixKVQCache.load(saved), tmp_path / "c"
    path.write_bytes(b"old")
    for size in (0, 100, 20_000):
        with pytest.raises(OSError, match="the cache cannot be saved") as error:
            limited(cache, path, size)
        assert error.value.errno == errno.EFBIG and error.value.filename == str(path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        cache.save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_links_and_permissions_stay(saved, tmp_path):
    cache = MixKVQCache.load(saved)
    cache.save(tmp_path / "real")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").write_bytes(b"old")
    cache.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == saved.read_bytes()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from mixkvq import MixKVQCache

path, sources, draw, seen = Path(sys.argv[1]), sys.argv[2:], random.Random(3), set()
caches, versions = [MixKVQCache.load(source) for source in sources], [Path(source).read_bytes() for source in sources]
caches[0].save(path)
for number in range(40):
    begun, begin = os.pipe()
    child = os.fork()
    while child == 0:
        caches[number % 2].save(path)
        os.write(begin, b".")
        number += 1
    os.read(begun, 1)
    os.close(begun), os.close(begin)
    time.sleep(draw.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(versions.index(path.read_bytes()))
    MixKVQCache.load(path)
print(sorted(seen))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_file(saved, tmp_path):
    """At any moment; one of those that were saved."""
    other = MixKVQCache.load(saved)
    other.batch_select_indices(torch.tensor([1]))
    other.save(tmp_path / "b")
    command = [sys.executable, "-c", KILLED, tmp_path / "c", saved, tmp_path / "b"]
    done = subprocess.run(command, capture_output=True, text=True, env=own_path())
    assert done.stdout == "[0, 1]\n", done.stderr
