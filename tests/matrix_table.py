"""The table of families and scenarios, from the reports of a test run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

MARKS = "<!-- table of make matrix -->", "<!-- end of table -->"


@dataclass
class Row:
    """What became of one family."""

    attention: set[str] = field(default_factory=set)
    paths: dict[str, str] = field(default_factory=dict)  # seen in the run, by attention
    outcomes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # tests by outcome
    without: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # scenarios skipped, by reason

    @property
    def path(self) -> str:
        """One for all attention implementations, or each with its own; a dash where none was seen."""
        if len(set(self.paths.values())) < 2:
            return next(iter(self.paths.values()), "-")
        return "; ".join(f"{attention}: {path}" for attention, path in sorted(self.paths.items()))


class Table:
    """Rows by family."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = defaultdict(Row)
        self.samples: dict[str, set[str]] = defaultdict(set)  # families by scenario that was not tried on all of them

    @classmethod
    def of(cls, stats: dict[str, list[Any]]) -> Table:
        """From the statistics of pytest's terminal reporter."""
        table = cls()
        for outcome in ("passed", "failed", "error", "skipped"):
            for report in stats.get(outcome, ()):
                about = dict(getattr(report, "user_properties", ()))
                if "family" not in about:
                    continue
                row = table.rows[about["family"]]
                if "sample" in about:
                    table.samples[about["sample"]].add(about["family"])
                row.attention.add(about["attention"])
                if "path" in about:
                    row.paths[about["attention"]] = shorten(about["path"])
                row.outcomes[outcome].add(report.nodeid)
                if outcome == "skipped":
                    scenario = report.nodeid.rpartition("-")[2].rstrip("]")
                    row.without[str(report.longrepr[2]).removeprefix("Skipped: ")].add(scenario)
        return table

    def markdown(self) -> str:
        """A Markdown table, and a footnote for every reason why a scenario does not apply."""
        lines = [
            "| family | attention | path of its layers | passed | failed | does not apply |",
            "|---|---|---|--:|--:|---|",
        ]
        notes: dict[str, int] = {}
        for name, row in self.rows.items():
            failed = len(row.outcomes["failed"] | row.outcomes["error"])
            skipped = [
                f"{', '.join(sorted(scenarios))} [{notes.setdefault(reason, len(notes) + 1)}]"
                for reason, scenarios in row.without.items()
            ]
            cells = (
                name,
                ", ".join(sorted(row.attention)),
                row.path,
                str(len(row.outcomes["passed"])),
                str(failed),
                "; ".join(skipped),
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"{number}. {reason}" for reason, number in notes.items())]
        if self.samples:
            tried = (f"{name} ({', '.join(sorted(self.samples[name]))})" for name in sorted(self.samples))
            lines += ["", f"Not a matter of the family, and tried on few: {'; '.join(tried)}."]
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """Replace what a Markdown file has between `MARKS`."""
        begin, end = MARKS
        before, found, rest = file.read_text().partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found and found_end):
            raise ValueError(f"--table is {file}, must be a file with the lines {begin} and {end}")
        file.write_text(f"{before}{begin}\n\n{self.markdown()}\n\n{end}{after}")


def shorten(path: str) -> str:
    """``packed packed native`` as ``2 packed, 1 native``, in the order of the layers."""
    return " or ".join(
        ", ".join(f"{len(list(group))} {name}" for name, group in groupby(one.split())) for one in path.split(" or ")
    )
