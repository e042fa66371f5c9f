"""`mixkvq.integrations.ray` on two local raylets: both work, one actor dies in the middle, every row is answered."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

import pyarrow
from cli_fixtures import WORDS, save_tiny_model
from ray.cluster_utils import Cluster
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument
from mixkvq.integrations.batches import BatchGenerator, BatchSettings
from mixkvq.integrations.ray import GenerateActor, actor_need, cluster_nodes, generate

BATCH, NEW, LIMIT = 4, 16, 400
EXAMPLE = Path(__file__).parent.parent / "examples" / "ray_batch.py"


class DieOnce(StoppingCriteria):
    """Stops no text. The first process that is in the middle of its second batch is killed, as by the kernel.

    Every process waits in its first batch until there are two, so that both get batches.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, 0

    def __call__(self, ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            (self.folder / f"process-{os.getpid()}").touch()
            deadline = time.monotonic() + 40
            while len(list(self.folder.glob("process-*"))) < 2:
                assert time.monotonic() < deadline, "the second actor did not get a batch"
                time.sleep(0.05)
        if self.calls == NEW + NEW // 2:
            try:
                (self.folder / "killed").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                (self.folder / "killed").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(ids), dtype=torch.bool)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """A cluster that hangs fails."""

    def stop(*args: Any) -> None:
        raise TimeoutError(f"{seconds} seconds are over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with time_limit(120):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def cluster(folder: str) -> Iterator[Any]:
    """Two raylets; each has memory for one actor and a half, and CPUs for two."""
    settings = BatchSettings(folder, max_new_tokens=NEW, max_prompt_tokens=LIMIT)
    memory = actor_need(settings, batch_size=BATCH).memory * 3 // 2
    short = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the paths of its sockets have at most 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", short)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(short)  # the driver's folder is searched for modules first, and that of the sources has no kernels
        node = {"num_cpus": 2, "memory": memory, "object_store_memory": 80 << 20}
        two = None
        try:
            with time_limit(120):
                two = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
                two.add_node(**node)
                ray.init(address=two.address, logging_level="warning")
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no module that an actor could import
            yield two
        finally:
            ray.shutdown()
            if two is not None:
                two.shutdown()
            shutil.rmtree(short, ignore_errors=True)


def prompts() -> list[dict[str, Any]]:
    """24 prompts of 1 to `LIMIT` words: with more than 260 tokens a cache packs some."""
    chance = random.Random(0)
    lengths = [1, LIMIT, *(chance.randrange(2, LIMIT) for _ in range(22))]
    return [{"id": i, "prompt": " ".join(chance.choices(WORDS, k=n))} for i, n in enumerate(lengths)]


def by_hand(folder: str, texts: list[str]) -> list[str]:
    """One batch in this process, with a cache of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, **cache_argument(MixKVQCache()), max_new_tokens=NEW, do_sample=False)
    return list(tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
def test_every_row_is_answered_though_an_actor_dies(cluster: Any, folder: str, tmp_path: Path) -> None:
    rows = prompts()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"stopping_criteria": StoppingCriteriaList([DieOnce(tmp_path)])}
    dataset = generate(
        ray.data.read_json(str(tmp_path / "prompts.jsonl")),
        folder,
        max_new_tokens=NEW,
        max_prompt_tokens=LIMIT,
        batch_size=BATCH,
        stats_column="stats",
        generate_options=options,
    )
    answered = sorted(dataset.take_all(), key=lambda row: row["id"])

    killed = int((tmp_path / "killed").read_text())
    stats = [row["stats"] for row in answered]
    assert not Path(f"/proc/{killed}").exists()
    assert len({s["node"] for s in stats}) == 2 and len({s["actor"] for s in stats}) == 2
    processes = {s["process"] for s in stats}
    assert len(processes) == 3 and killed in processes  # two actors, one of them twice; what it did before stays

    assert [{"id": row["id"], "prompt": row["prompt"]} for row in answered] == rows
    texts = [row["prompt"] for row in rows]
    batches = [text for i in range(0, 24, BATCH) for text in by_hand(folder, texts[i : i + BATCH])]
    assert [row["generated"] for row in answered] == batches == [by_hand(folder, [text])[0] for text in texts]
    assert len(set(batches)) > 12
    assert [s["prompt_tokens"] for s in stats] == [len(text.split()) for text in texts]
    assert {s["new_tokens"] for s in stats} == {NEW} and all(s["cache_bytes"] > 0 for s in stats)


@pytest.mark.slow
def test_the_actors_are_those_that_fit(cluster: Any, folder: str) -> None:
    nodes = cluster_nodes()
    assert [node.cpus for node in nodes] == [2, 2] and nodes[0].memory == nodes[1].memory
    dataset = ray.data.from_items(prompts())
    options = {"max_new_tokens": NEW, "batch_size": BATCH}
    with pytest.raises(
        ValueError, match=r"(?s)no worker fits: each needs .* there is\n.* and 2 CPUs\nLower batch_size"
    ):
        generate(dataset, folder, **options, process_bytes=nodes[0].memory)
    with pytest.raises(ValueError, match="no worker fits"):
        generate(dataset, folder, **options, max_prompt_tokens=LIMIT, num_cpus=3)


@pytest.mark.slow
def test_the_example_answers_a_file(cluster: Any, folder: str, tmp_path: Path) -> None:
    texts = ["the cat sat", "", " ".join(WORDS * 30), "a big red dog"]
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": t, "id": i}) + "\n" for i, t in enumerate(texts))
    )
    command = [sys.executable, EXAMPLE, tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", "--model", folder]
    more = ["--address", cluster.address, "--max-new-tokens", NEW, "--max-prompt-tokens", LIMIT, "--batch-size", 2]
    more += ["--concurrency", 1]
    done = subprocess.run(
        [str(part) for part in command + more], capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    long = f"prompt has 480 tokens, must have at most {LIMIT}"
    assert rows == [
        {"prompt": texts[0], "id": 0, "generated": by_hand(folder, [texts[0]])[0], "error": None},
        {"prompt": texts[1], "id": 1, "generated": None, "error": "prompt is empty, must have at least one token"},
        {"prompt": texts[2], "id": 2, "generated": None, "error": long},
        {"prompt": texts[3], "id": 3, "generated": by_hand(folder, [texts[3]])[0], "error": None},
    ]
    assert "4 rows, 2 of them with an error" in done.stdout and "1 actors on 1 nodes" in done.stdout
    assert f"7 prompt tokens, {2 * NEW} new ones" in done.stdout


def actor(folder: str, column: str = "prompt", output: str = "out", error: str | None = None) -> GenerateActor:
    """The class without an actor around it."""
    return GenerateActor(
        BatchSettings(folder, max_new_tokens=NEW, max_prompt_tokens=LIMIT), column, output, error, None
    )


def test_an_actor_keeps_other_columns_as_they_are(folder: str) -> None:
    table = pyarrow.table({"prompt": ["the cat", None], "n": pyarrow.array([1, None], pyarrow.int8())})
    result = actor(folder, error="error")(table)
    assert result.drop_columns(["out", "error"]).equals(table)
    assert result["out"].to_pylist() == [by_hand(folder, ["the cat"])[0], None]
    assert result["error"].to_pylist() == [None, "prompt is a NoneType, must be a string"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"column": "text"}, "column is 'text', must be one of the dataset's: prompt, n"),
        ({"output": "n"}, "output_column is 'n', which the dataset already has: prompt, n"),
        ({"error": "n"}, "error_column is 'n', which the dataset already has"),
        ({}, r"prompt is empty, must have at least one token, in the row \{'prompt': '', 'n': 2\}: filter the dataset"),
    ],
)
def test_an_actor_refuses(folder: str, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        actor(folder, **columns)(pyarrow.table({"prompt": ["the cat", ""], "n": [1, 2]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_column": "prompt"}, "column, output_column, .* are 'prompt', 'prompt', .* must be different names"),
        ({"batch_size": 0}, "batch_size is 0, must be an int of at least 1"),
        ({"concurrency": 1.5}, "concurrency is 1.5, must be an int of at least 1"),
        ({"num_cpus": -1}, "num_cpus is -1, must be a number of 0 or more"),
        ({"num_cpus": "2"}, "num_cpus is '2', must be a number of 0 or more"),
        ({"num_cpus": True}, "num_cpus is True, must be a number of 0 or more"),
        ({"process_bytes": 1e9}, "process_bytes is 1000000000.0, must be an int"),
        ({"preset": "defualt"}, "unknown preset 'defualt'"),
        ({"cache_options": {"value_bit": 4}}, "value_bit"),
        ({"max_prompt_tokens": 5000}, "max_prompt_tokens is 5000 .* at most 4096"),
    ],
)
def test_wrong_arguments(folder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        generate(None, folder, **options)


def test_what_is_reserved_is_what_the_longest_batch_holds_at_its_peak(folder: str) -> None:
    settings = BatchSettings(folder, max_new_tokens=NEW, max_prompt_tokens=LIMIT)
    generator, caches = BatchGenerator(settings), []
    fresh = BatchSettings.fresh_cache

    def kept(self: BatchSettings, config: Any) -> Any:
        caches.append(fresh(self, config))
        return caches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchSettings, "fresh_cache", kept)
        _, held = generator.answer(generator.encode([" ".join((WORDS * 26)[i : i + LIMIT]) for i in range(BATCH)]))
    peak = caches[-1].report().peak_nbytes
    reserved = actor_need(settings, batch_size=BATCH).cache
    assert 0 < held <= peak <= reserved <= 1.05 * peak


def test_a_beam_is_a_row_of_the_cache(folder: str) -> None:
    def cache(**options: Any) -> int:
        return actor_need(BatchSettings(folder, generate_options=options), batch_size=4).cache

    assert cache(num_beams=3) > 2.9 * cache()


def test_without_ray(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import mixkvq.integrations.ray"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "ImportError: mixkvq.integrations.ray needs ray: pip install 'mixkvq[ray]'" in done.stderr
