"""Events of a job on the terminal: bars while something is read, the answer as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status


class Bar:
    """One progress bar, shown from construction to `stop`."""

    def __init__(self, console: Console, caption: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(caption, total=total)
        self._progress.start()

    def update(self, done: int) -> None:
        """Show that `done` of the total is done."""
        self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


class Display:
    """Shows events (see `mixkvq.eval.stream.Emit`).

    Parameters
    ----------
    console : Console
        Where to.
    captions : mapping
        Captions of the bars for "layer" and "chunk"; an event without a caption is not shown.
    """

    def __init__(self, console: Console, captions: Mapping[str, str]) -> None:
        self._console, self._captions = console, captions
        self._bar: Bar | None = None
        self._busy: Status | None = None
        self._kind = ""
        self._open_line = False

    def show(self, event: str, value: Any) -> None:
        """Show one event."""
        if event == "say":
            self.close()
            self._console.print(value, style="dim", markup=False, highlight=False)
            self._busy = self._console.status("")
            self._busy.start()
        elif event == "text":
            self._stop()
            self._console.print(value, end="", style="cyan", markup=False, highlight=False, soft_wrap=True)
            self._open_line = not value.endswith("\n")
        elif event in self._captions:
            done, total = value
            if event != self._kind or self._bar is None:
                self.close()
                self._bar, self._kind = Bar(self._console, self._captions[event], total), event
            self._bar.update(done)

    def _stop(self) -> None:
        for moving in (self._bar, self._busy):
            if moving is not None:
                moving.stop()
        self._bar = self._busy = None

    def close(self) -> None:
        """Stop what moves and end the line of the text."""
        self._stop()
        if self._open_line:
            self._console.print()
            self._open_line = False

    def follow(self, events: Iterable[tuple[str, Any]]) -> Any:
        """Show all events; returns the value of the "result" event, or None if there is none."""
        result = None
        try:
            for event, value in events:
                if event == "result":
                    result = value
                else:
                    self.show(event, value)
        finally:
            self.close()
        return result
