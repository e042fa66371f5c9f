"""Rows as tables in Markdown: ``python -m gpu.table build/gpu/gpu.jsonl ...``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from . import goals
from .record import Row, read


def number(value: float | None, digits: int = 3) -> str:
    """Some digits, "-" for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A share of 1."""
    return "-" if value is None else f"{100 * value:.0f} %"


def sheet(title: str, head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """One table, or nothing where it has no lines."""
    found = ["| " + " | ".join(line) + " |" for line in lines]
    if not found:
        return ""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join([f"### {title}", "", "| " + " | ".join(head) + " |", rule, *found, ""])


def context(tokens: float) -> str:
    """4096 as 4k."""
    return f"{tokens / 1024:.0f}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:.0f}"


def _steps(rows: list[Row]) -> str:
    kinds = ("build", "test", "sanitize", "cpu")
    lines = []
    for row in rows:
        if row.step in kinds:
            values = ", ".join(f"{name} {number(value)}" for name, value in row.values.items())
            lines.append([row.step, row.case, values, str(row.facts.get("note") or row.facts.get("why", ""))])
    return sheet("Build, tests, sanitizer", ("step", "what", "numbers", "note"), lines, 4)


def _rates(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row.step == "rate":
            values = [f"{name} {number(value, 4)}" for name, value in row.values.items()]
            lines.append([row.case, ", ".join(values) + str(row.facts.get("why", ""))])
    return sheet("Rates", ("what", "found"), lines, 2)


def _attention(rows: list[Row]) -> str:
    head = (
        "head_dim",
        "tokens",
        "query heads per KV head",
        "batch",
        "system",
        "us",
        "us, graph",
        "GB/s",
        "of copy rate",
    )
    lines = []
    for row in rows:
        if row.step != "kernels":
            continue
        w, v = row.where, row.values
        name = f"**{row.case}**" if row.facts.get("best_rival") else row.case
        if row.facts.get("role") == "packed":
            name = f"`{row.case}`"
        line = [str(w["head_dim"]), context(w["tokens"]), str(w["group"]), str(w["batch"]), name]
        if v.get("us") is None:
            lines.append([*line, *["-"] * 5, str(row.facts.get("why", ""))])
            continue
        line += [number(v["us"]), number(v["us_graph"]), number(v["gbps"]), percent(v["share_of_copy"])]
        verdict = row.facts.get("copy goal")
        both = f"copy rate: {verdict}; SDPA: {row.facts.get('sdpa goal')}" if verdict else ""
        lines.append([*line, number(v.get("times_faster")), both])
    title = "Attention of one step; the best SDPA in bold, against which `times` is"
    return sheet(title, (*head, "times", "goals"), lines, 5)


def _verbs(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row.step == "verbs":
            v, w = row.values, row.where
            size = ", ".join(f"{name} {value}" for name, value in w.items())
            shown = (v["us"], v["us_graph"], v["us_per_head_block"], v["gbps"])
            lines.append([row.case, size, *map(number, shown)])
    return sheet("Other calls", ("call", "sizes", "us", "us, graph", "us per head block", "GB/s"), lines, 2)


def _model(rows: list[Row]) -> str:
    parts: dict[str, list[list[str]]] = {"decode": [], "prefill": [], "largest batch": [], "left out": []}
    for row in rows:
        if row.step != "model":
            continue
        v, w, part = row.values, row.where, str(row.facts.get("part", ""))
        if "why" in row.facts and v.get("rows") is None:
            parts["left out"].append([row.case, part, str(row.facts["why"])])
        elif part == "decode":
            gb, bits = number((v["kv_bytes"] or 0) / 1e9), number(v.get("effective_bits"))
            line = [row.case, context(w["tokens"]), str(w["batch"]), number(v["tokens_per_second"]), gb, bits]
            verdict = row.facts.get("speed goal")
            both = f"tokens/s: {verdict}; bytes: {row.facts.get('memory goal')}" if verdict else ""
            parts[part].append([*line, number(v["times_faster"]), number(v["share_of_kv_bytes"]), both])
        elif part == "prefill":
            gb = [number(v[key] and v[key] / 1e9) for key in ("peak_bytes", "steady_bytes")]
            line = [row.case, context(w["tokens"]), number(v["seconds"]), *gb]
            parts[part].append([*line, number(v["share_of_peak"]), str(row.facts.get("peak goal", ""))])
        elif part == "largest batch":
            line = [row.case, context(w["tokens"]), number(v["rows"]), number(v["computed_rows"])]
            parts[part].append([*line, str(row.facts["why"])])
    heads = {
        "decode": ("cache", "tokens", "batch", "tokens/s", "KV, GB", "bits", "times", "of the bytes", "goals"),
        "prefill": ("cache", "tokens", "s", "peak, GB", "then, GB", "of the peak", "goal"),
        "largest batch": ("cache", "tokens", "rows", "computed", "how"),
        "left out": ("cache", "part", "why"),
    }
    return "\n".join(filter(None, (sheet(f"Llama, {part}", heads[part], parts[part], 1) for part in parts)))


def _goals(rows: list[Row]) -> str:
    packed = [row for row in rows if "copy goal" in row.facts]
    decoded = [row for row in rows if "speed goal" in row.facts]
    filled = [row for row in rows if "peak goal" in row.facts]
    findings = [row for row in rows if row.step == "sanitize" and "findings" in row.values]
    found: list[tuple[goals.Goal, list[Row], str]] = [
        (goals.COPY_SHARE, packed, "share_of_copy"),
        (goals.SDPA_RATIO, packed, "times_faster"),
        (goals.TOKENS_RATIO, decoded, "times_faster"),
        (goals.MEMORY_RATIO, decoded, "share_of_kv_bytes"),
        (goals.PREFILL_RATIO, filled, "share_of_peak"),
        (goals.FINDINGS, findings, "findings"),
    ]
    lines = []
    for goal, where, key in found:
        values = [value for row in where if (value := row.values.get(key)) is not None]
        worst = (max if goal.at_most else min)(values, default=None)
        span = f"{number(min(values))} to {number(max(values))}" if values else "-"
        lines.append([goal.name, goal.text, span, str(len(values)), goal.verdict(worst)])
    return sheet("Goals; the verdict is that of the worst case", ("goal", "bar", "found", "cases", "verdict"), lines, 3)


def _machines(rows: list[Row]) -> Iterator[str]:
    seen = set()
    for row in rows:
        about = [f"{name} {value}" for name, value in row.facts.items() if name != "when"]
        line = f"{row.case}: {', '.join(about)}"
        if row.step == "machine" and row.case not in seen:
            seen.add(row.case)
            yield line


def latest(rows: list[Row]) -> list[Row]:
    """The last row of everything that was measured more than once, in the order of the first."""
    found: dict[str, Row] = {}
    for row in rows:
        found[json.dumps([row.device, row.step, row.case, row.where, row.facts.get("part")], sort_keys=True)] = row
    return list(found.values())


def render(rows: list[Row]) -> str:
    """Everything there is."""
    rows = latest(rows)
    parts: tuple[Callable[[list[Row]], str], ...] = (_steps, _rates, _attention, _verbs, _model, _goals)
    return "\n".join([*_machines(rows), "", *filter(None, (part(rows) for part in parts))])


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of some files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    print(render(read(*parser.parse_args(arguments).files)))


if __name__ == "__main__":
    main()
