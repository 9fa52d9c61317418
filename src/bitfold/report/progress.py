"""How far a run is: a bar on a terminal, lines in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from bitfold.report import terminal

__all__ = ["showing_progress", "showing_steps"]


@contextmanager
def showing_progress(what: str) -> Iterator[Callable[[float, int, str], None]]:
    """On stderr: a bar with the time left, or in a log a line for every tenth of the way."""
    console = terminal.console(stderr=True)
    console.file = (
        sys.stderr
    )  # as it is now: libraries below are silenced by redirecting it, the bar is not
    if not console.is_terminal:
        yield _lines(console, what)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeLeft(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task(what, total=None)

        def update(done: float, total: int, doing: str) -> None:
            if done < bar.tasks[0].completed:  # another part of the work: its own time is left
                bar.reset(task)
            bar.update(task, completed=done, total=total, description=f"{what}: {doing}")

        yield update


@contextmanager
def showing_steps() -> Iterator[Callable[[str], None]]:
    """On stderr: what is being done, in one line that changes, or in a log a line for each step."""
    console = terminal.console(stderr=True)
    if not console.is_terminal:
        yield lambda doing: console.print(doing, markup=False)
        return
    with console.status("starting") as status:
        yield status.update


def _lines(console: Any, what: str) -> Callable[[float, int, str], None]:
    reached, last = -1, 0.0

    def update(done: float, total: int, doing: str) -> None:
        nonlocal reached, last
        if done < last:  # another part of the work
            reached = -1
        last = done
        if int(10 * done / total) > reached:
            reached = int(10 * done / total)
            console.print(f"{what} {done / total:.0%}: {doing}", markup=False)

    return update
