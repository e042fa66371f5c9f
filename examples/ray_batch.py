"""Answer a file of prompts on all machines of a Ray cluster, or on this one, with a quantized cache per batch.

    python examples/ray_batch.py PROMPTS ANSWERS --model DIR [--address auto]

PROMPTS has a JSON object with the field "prompt" in each line, or if it ends in .txt a prompt; ANSWERS gets the same
objects in the same order with the field "generated" (or "error"). On a cluster, DIR must be readable on every machine.
Needs pip install 'mixkvq[ray]'.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data

from mixkvq import list_presets
from mixkvq.eval.checkpoints import CHECKPOINTS
from mixkvq.integrations.ray import generate


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of prompts."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if path.suffix == ".txt":
            yield {"id": number, "prompt": line}
        elif line.strip():
            yield json.loads(line)


def main() -> None:
    """Read, answer, write, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", required=True, help="a folder, a name on a hub, or one of " + ", ".join(CHECKPOINTS))
    parser.add_argument("--preset", default="default", choices=list_presets())
    parser.add_argument("--address", help="of a cluster; 'auto': the one that runs here (default: start a local one)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-prompt-tokens", type=int, help="reserves less memory (default: what the model can take)")
    parser.add_argument("--concurrency", type=int, help="at most this many actors (default: as many as fit)")
    parser.add_argument("--num-cpus", type=float, default=1, help="CPUs, and threads, of an actor")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    options = parser.parse_args()
    rows = list(read(options.prompts))
    if not rows:
        parser.error(f"{options.prompts} has no prompts")

    ray.init(address=options.address)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    model = options.model
    if model in CHECKPOINTS:
        model = str(CHECKPOINTS[model].convert(print))
    answers = generate(
        ray.data.from_items(rows),
        model,
        preset=options.preset,
        apply_chat_template=options.chat,
        max_new_tokens=options.max_new_tokens,
        max_prompt_tokens=options.max_prompt_tokens,
        batch_size=options.batch_size,
        concurrency=options.concurrency,
        num_cpus=options.num_cpus,
        error_column="error",
        stats_column="stats",
    )
    started, stats, errors = time.perf_counter(), [], 0
    with options.answers.open("w", encoding="utf-8") as out:
        for row in answers.iter_rows():
            stats.append(row.pop("stats"))
            errors += row["error"] is not None
            print(json.dumps(row, ensure_ascii=False), file=out)
    seconds = time.perf_counter() - started
    batches = {(s["actor"], s["process"], s["batch"]): s["cache_bytes"] for s in stats}
    tokens = sum(s["new_tokens"] for s in stats)
    print(
        f"{len(stats)} rows, {errors} of them with an error, in {seconds:.1f} s\n"
        f"{sum(s['prompt_tokens'] for s in stats)} prompt tokens, {tokens} new ones: {tokens / seconds:.1f} new "
        f"tokens/s, with the start of the actors\n"
        f"{len(batches)} batches: a cache held {sum(batches.values()) / len(batches) / 1e6:.2f} MB on average, "
        f"{max(batches.values()) / 1e6:.2f} MB at most\n"
        f"{len({s['actor'] for s in stats})} actors on {len({s['node'] for s in stats})} nodes"
    )


if __name__ == "__main__":
    main()
