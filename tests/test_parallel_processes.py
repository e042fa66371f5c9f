"""transformers' own parallelism, in processes of their own: what one process gives, and what the others hold of it.

Under tensor parallelism sums over all heads are added up in other steps than in one process, and rounded otherwise: a
number next to a border of a code may fall on its other side, which moves logits by more than rounding. So there are two
references: the model as it is, and the model in one process whose linear layers are added up in the same steps. There
nothing but the cache could differ, and logits must be within 1e-4.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompts, tiny
from parallel_ranks import IN_ORDER, answer, in_parts
from torchrun import ROOT, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixkvq import list_presets
from mixkvq.cli import UserError
from mixkvq.cli.text import text_ids
from mixkvq.eval.checkpoints import SMOLLM2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("transformers.distributed.pipeline_parallel") is None or not torch.distributed.is_gloo_available(),
        reason="this transformers has no pipeline stages, or this torch no gloo",
    ),
]

PRESETS = list_presets()
BOUND = 1e-4
"""Of logits in float32; they span 15 to 20."""
TIE = 0.3
"""Of logits of one process, where codes may differ: no further apart than codes have moved them (0.25 at most)."""
PROMPTS = prompts([380, 330])
"""Two rows, one padded on the left. Two blocks are packed after the prompt, and a third one of the first row later."""
RANKS = Path(__file__).parent / "parallel_ranks.py"
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
Answers = list[dict[str, Any]]


MODELS = {
    "llama": SHAPE,
    "one layer": SHAPE | {"num_hidden_layers": 1},
    "three heads": {"num_key_value_heads": 3, "num_attention_heads": 6, "hidden_size": 96},
}


def model_of(name: str) -> Any:
    return tiny("llama", **MODELS[name])


def spread(
    out: Path,
    models: dict[str, Path],
    tp: int,
    pp: int,
    presets: Sequence[str] = PRESETS,
    inputs: dict[str, torch.Tensor] = PROMPTS,
    new_tokens: int = 24,
    limit: int = 120,
) -> Answers:
    """What every process answers."""
    folders = {name: str(folder) for name, folder in models.items()}
    task = {"models": folders, "presets": presets, "inputs": inputs, "new_tokens": new_tokens}
    torch.save(task, out / "task.pt")
    status, output = torchrun(tp * pp, RANKS, str(out), str(tp), str(pp), limit=limit)
    assert status == 0, output
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(tp * pp)]


def saved(out: Path, names: Iterable[str]) -> dict[str, Path]:
    """Folders of tiny models."""
    for name in names:
        model_of(name).save_pretrained(out / name)
    return {name: out / name for name in names}


@functools.cache
def by_one(model: Any, preset: str, parts: int = 1, precision: str = "default") -> dict[str, Any]:
    """What one process answers, with linear layers in so many parts."""
    with in_parts(model, parts):
        return answer(model, preset, PROMPTS, precision=precision)


@pytest.fixture(scope="module")
def by_heads(tmp_path_factory):
    """Answers of two processes with half of the heads each."""
    out = tmp_path_factory.mktemp("heads")
    return spread(out, saved(out, MODELS), 2, 1)


@pytest.fixture(scope="module")
def by_layers(tmp_path_factory):
    """Answers of two processes with half of the layers each."""
    out = tmp_path_factory.mktemp("layers")
    return spread(out, saved(out, ["llama"]), 1, 2)


def agreed(one: dict[str, Any], ranks: Answers) -> int:
    """Steps with the same tokens before them, in all rows and processes."""
    first = one["tokens"].shape[1] - len(one["logits"])
    same = torch.stack([rank["tokens"] == one["tokens"] for rank in ranks]).flatten(0, 1).all(0)[first:]
    return min(int(same.int().cumprod(0).sum()) + 1, len(same))


def gap(one: dict[str, Any], ranks: Answers) -> float:
    """Largest difference of logits, as long as the tokens are the same."""
    steps = agreed(one, ranks)
    return max(float((rank["logits"][:steps] - one["logits"][:steps]).abs().max()) for rank in ranks)


def differing(one: dict[str, Any], ranks: Answers, tp: int) -> tuple[int, int]:
    """How many records of one process are other bytes in the one that has them, and how many there are."""
    other = count = 0
    for rank, held in enumerate(ranks):
        part = rank % tp
        for mine, theirs in zip(held["layers"], one["layers"], strict=False):
            heads = len({head for _, head, _ in theirs["records"]}) // tp
            for (row, head, block), record in mine["records"].items():
                other += record != theirs["records"][row, part * heads + head, block]
                count += 1
    return other, count


def assert_bytes_add_up(one: dict[str, Any], ranks: Answers, tp: int) -> None:
    """Records and all bytes; what belongs to rows and not to heads is there once per process with the layer."""
    for index, whole in enumerate(one["layers"]):
        parts = [rank["layers"][index] for rank in ranks if index < len(rank["layers"])]
        parts = [layer for layer in parts if layer["tokens"]]
        assert len(parts) == tp and {layer["path"] for layer in parts} == {whole["path"]} == {"packed"}
        assert {layer["tokens"] for layer in parts} == {whole["tokens"]}
        assert sum(layer["record_bytes"] for layer in parts) == whole["record_bytes"] > 0
        assert {layer["of_rows"] for layer in parts} == {whole["of_rows"]}
        assert sum(layer["nbytes"] for layer in parts) == whole["nbytes"] + (tp - 1) * whole["of_rows"]
    of_rows = sum(layer["of_rows"] for layer in one["layers"])
    assert sum(rank["nbytes"] for rank in ranks) == one["nbytes"] + (tp - 1) * of_rows
    assert 0 < of_rows < one["nbytes"] / 1000


def assert_same_tokens(one: dict[str, Any], ranks: Answers, tie: float = 0.0) -> None:
    """The same in all processes, and those of one process up to a tie of its logits, where a code may decide."""
    assert all(torch.equal(rank["tokens"], ranks[0]["tokens"]) for rank in ranks)
    if torch.equal(ranks[0]["tokens"], one["tokens"]):
        return
    logits = one["logits"][agreed(one, ranks) - 1]
    chosen = [answer["tokens"][:, -len(one["logits"]) :][:, agreed(one, ranks) - 1, None] for answer in (one, ranks[0])]
    apart = float((logits.gather(1, chosen[0]) - logits.gather(1, chosen[1])).abs().max())
    assert apart <= tie, f"other tokens, whose logits are {apart} apart"


# ---- tensor parallelism --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_heads_on_two_processes(by_heads, preset):
    ranks, model = [rank["llama"][preset] for rank in by_heads], model_of("llama")
    one, same_sums = by_one(model, preset), by_one(model, preset, 2)
    assert_same_tokens(one, ranks, 0.0 if preset == "lossless" else TIE)
    assert_same_tokens(same_sums, ranks)
    far, close = gap(one, ranks), gap(same_sums, ranks)
    (other, count), (wrong, _) = differing(one, ranks, 2), differing(same_sums, ranks, 2)
    print(f"{preset}: logits {far:.1e}, {other} of {count} records; same sums: {close:.1e}, {wrong}")
    assert close <= BOUND and wrong == 0 and count == sum(len(layer["records"]) for layer in one["layers"])
    if preset == "lossless":
        assert far <= BOUND
    assert_bytes_add_up(one, ranks, 2)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_other_sums_do_to_one_process(preset):
    """Beside codes, queries and probabilities are rounded (``precision``); without both, logits are as close."""
    model = model_of("llama")
    one, split = (by_one(model, preset, parts, "exact") for parts in (1, 2))
    records = [[record for layer in x["layers"] for record in layer["records"].values()] for x in (one, split)]
    other = sum(a != b for a, b in zip(*records, strict=True))
    print(f"{preset}, precision exact: logits {gap(one, [split]):.1e}, {other} of {len(records[0])} records")
    assert gap(one, [split]) <= BOUND or (other > 0 and preset != "lossless")


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_that_no_sum_over_heads_has_touched(by_heads, preset):
    """One layer: its keys and values come from the embeddings, are rounded as in one process, and give its codes."""
    ranks, one = [rank["one layer"][preset] for rank in by_heads], by_one(model_of("one layer"), preset)
    print(f"{preset}: logits {gap(one, ranks):.1e}, {differing(one, ranks, 2)} records")
    assert_same_tokens(one, ranks)
    assert gap(one, ranks) <= BOUND
    assert_bytes_add_up(one, ranks, 2)


def test_heads_that_cannot_be_spread(by_heads):
    """transformers loads such a model; the cache stops it before it fails on keys that are no whole heads."""
    for rank in by_heads:
        assert rank["three heads"].startswith("num_key_value_heads is 3 and tp_size is 2: every process must hold")


# ---- pipeline parallelism ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_layers_on_two_processes(by_layers, preset):
    ranks, one = [rank["llama"][preset] for rank in by_layers], by_one(model_of("llama"), preset)
    assert_same_tokens(one, ranks)
    print(f"{preset}: logits {gap(one, ranks):.1e}, {differing(one, ranks, 1)} records")
    assert gap(one, ranks) <= BOUND and differing(one, ranks, 1)[0] == 0
    assert_bytes_add_up(one, ranks, 1)


def test_processes_that_wait_for_ever_are_ended(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name('pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(TimeoutError, match=r"wait\.py took longer than 15 s"):
        torchrun(2, script, limit=15)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


# ---- a real model --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smollm2() -> Path:
    pytest.importorskip("gguf")
    try:
        SMOLLM2.require()
    except UserError as error:
        pytest.skip(str(error))
    return SMOLLM2.convert()


def test_three_heads_on_three_processes(smollm2, tmp_path):
    """SmolLM2: 9 query heads, 3 KV heads, 30 layers. Sums of three numbers have several orders."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = text_ids(tokenizer, 290)
    ids = torch.tensor([text, [0] * 20 + text[:270]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, :20] = 0
    presets = ["lossless", "default", "default" + IN_ORDER]
    answers = spread(tmp_path, {"smollm2": smollm2}, 3, 1, presets, inputs, 12, limit=300)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    by_preset = {preset: [rank["smollm2"][preset] for rank in answers] for preset in presets}
    one = {preset: answer(model, preset, inputs, 12) for preset in ("lossless", "default")}
    with in_parts(model, 3):
        one["default" + IN_ORDER] = answer(model, "default", inputs, 12)
    for preset, ranks in by_preset.items():
        print(f"{preset}: logits {gap(one[preset], ranks):.1e}, {differing(one[preset], ranks, 3)} records")
        assert_same_tokens(one[preset], ranks, TIE if preset == "default" else 0.0)
        assert_bytes_add_up(one[preset], ranks, 3)
    for preset in ("lossless", "default" + IN_ORDER):
        assert gap(one[preset], by_preset[preset]) <= BOUND
    assert differing(one["default" + IN_ORDER], by_preset["default" + IN_ORDER], 3)[0] == 0


def test_the_example(smollm2, monkeypatch, capsys):
    """In two stages it prints what one process does."""
    script, arguments = ROOT / "examples" / "tensor_parallel.py", ["--new-tokens", "12"]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    one = capsys.readouterr().out
    status, two = torchrun(2, script, "--pipeline", *arguments)
    assert status == 0, two
    told = re.compile(r"process (\d) of \d: layers (\d+) to (\d+), ([\d,]+) bytes in records, ([\d,]+) in all\n")
    assert [match[:3] for match in sorted(told.findall(two))] == [("0", "0", "14"), ("1", "15", "29")]
    assert told.sub("", one).strip() and told.sub("", one).strip() in told.sub("", two)
    nbytes = [sum(int(match[4].replace(",", "")) for match in told.findall(text)) for text in (one, two)]
    assert nbytes[0] == nbytes[1] > 0
