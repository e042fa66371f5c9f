"""The demo's result: one dictionary for JSON, one table for the eye."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from .answer import Answer
from .score import Score

FIRST_POSITIONS = 512


def _answer_numbers(answer: Answer, bf16_bytes: int, bits: Any) -> dict[str, Any]:
    exact_bits = 16 * answer.cache_bytes / bf16_bytes
    return {
        "answer": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": len(answer.ids),
        "prompt_tokens_per_second": answer.prompt_rate,
        "decode_tokens_per_second": answer.decode_rate,
        "cache_tokens": answer.cache_tokens,
        "cache_bytes": answer.cache_bytes,
        "cache_share_of_bf16": answer.cache_bytes / bf16_bytes,
        "peak_extra_bytes": answer.peak_extra_bytes,
        "true_bits": exact_bits if bits is None else bits.true_bits,
        "effective_bits": exact_bits if bits is None else bits.effective_bits,
        "layers_by_path": None if bits is None else bits.paths,
    }


def result(exact: dict[str, Any], ours: dict[str, Any], score: Score) -> dict[str, Any]:
    """All numbers of the table and their context; the arguments are what `mixkvq.cli.jobs.perform` returned."""
    return {
        "exact": _answer_numbers(exact["answer"], exact["bf16_bytes"], None),
        "mixkvq": _answer_numbers(ours["answer"], ours["bf16_bytes"], ours["bits"]),
        "same_answer": exact["answer"].ids == ours["answer"].ids,
        "teacher_forced": {
            "kl_nats": score.mean_kl(),
            "top1_agreement": score.agreement(),
            "positions": len(score.kl),
            "prefill_tokens": score.prefill,
            "chunks": score.chunks,
            f"kl_nats_first_{FIRST_POSITIONS}": score.mean_kl(FIRST_POSITIONS),
            f"top1_agreement_first_{FIRST_POSITIONS}": score.agreement(FIRST_POSITIONS),
            "trace_tokens_exact_bytes_mixkvq_bytes": score.trace,
        },
    }


def _megabytes(value: int | None) -> str:
    return "not measured here" if value is None else f"{value / 1e6:.1f} MB"


def render(numbers: dict[str, Any], *, dtype: str, preset: str) -> Table:
    """The table side by side."""
    exact, ours, forced = numbers["exact"], numbers["mixkvq"], numbers["teacher_forced"]
    table = Table(show_lines=True, title="Same model, same prompt, greedy decoding")
    table.add_column("")
    table.add_column(f"DynamicCache ({dtype})", ratio=1)
    table.add_column(f"MixKVQCache ({preset})", ratio=1)
    table.add_row("answer", *(side["answer"].strip() for side in (exact, ours)))

    def row(name: str, text: Any) -> None:
        table.add_row(name, text(exact), text(ours))

    row("prompt read", lambda s: f"{s['prompt_tokens_per_second']:.0f} tokens/s ({s['prompt_tokens']} tokens)")
    row("decoding", lambda s: f"{s['decode_tokens_per_second']:.1f} tokens/s ({s['new_tokens']} tokens)")
    row("cache", lambda s: f"{_megabytes(s['cache_bytes'])} for {s['cache_tokens']} tokens")
    row("share of a bf16 cache", lambda s: f"{s['cache_share_of_bf16']:.3f}")
    row("true / effective bits", lambda s: f"{s['true_bits']:.2f} / {s['effective_bits']:.2f}")
    row("peak memory above the model", lambda s: _megabytes(s["peak_extra_bytes"]))
    table.add_row("KL to the exact cache", "0", f"{forced['kl_nats']:.4f} nats over {forced['positions']} positions")
    table.add_row("same most likely token", "1", f"{forced['top1_agreement']:.3f} of {forced['positions']} positions")
    return table


def footnotes(numbers: dict[str, Any]) -> list[str]:
    """How the numbers of the table were measured."""
    forced = numbers["teacher_forced"]
    first = FIRST_POSITIONS
    return [
        f"KL and top-1: the documentation as plain text, {forced['prefill_tokens']} tokens read at once, the next "
        f"{forced['positions']} teacher-forced with both caches in {forced['chunks']} chunks that end on block borders "
        f"(the same logits as token by token); KL(exact || quantized). First {first} positions alone: "
        f"KL {forced[f'kl_nats_first_{first}']:.4f}, top-1 {forced[f'top1_agreement_first_{first}']:.3f}.",
        "True bits: all bytes of the packed records per element in them. Effective bits: all bytes of the cache per "
        "element, with the newest tokens, which are still exact.",
        "Each column was measured in a process of its own; peak memory is resident memory during generate, less what "
        "was resident with the model loaded.",
    ]
