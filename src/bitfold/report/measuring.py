"""`bitfold eval`: what is asked for in one command, measured, and said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from bitfold.errors import DataError
from bitfold.report import measured, terminal
from bitfold.report.ending import USAGE_ERROR

__all__ = ["Measures", "measure", "named_files", "print_measures"]

Progress = Callable[[float, int, str], None]


@dataclass(frozen=True)
class Measures:
    """What to measure a model by, as the command line says it; DataError or a usage error where that cannot be."""

    text: Sequence[str] = ()
    tasks: str | None = None
    kl_base: Path | None = None
    write: bool = False
    against: str | None = None
    sequence_length: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """What contradicts itself is refused before anything is loaded."""
        if not (self.text or self.tasks is not None or self.kl_base):
            raise USAGE_ERROR(
                "Nothing to measure: give --text FILE, --tasks NAME,… or --kl-base FILE, see `bitfold eval --help`"
            )
        if self.write:
            refused = {"--tasks": self.tasks, "--against": self.against}
            given = [name for name, value in refused.items() if value is not None]
            if self.kl_base is None or len(self.text) != 1:
                raise USAGE_ERROR("--write makes the file of --kl-base from one --text: give both")
            if given:
                raise USAGE_ERROR(f"--write only writes: leave {' and '.join(given)} out")
        elif not self.text:
            if self.sequence_length is not None:
                raise USAGE_ERROR("--sequence-length is of --text: leave it out")
            if self.against is not None and self.tasks is None:
                raise USAGE_ERROR(
                    "--against is of --text and --tasks, the file of --kl-base has its own logits: leave it out"
                )


def measure(
    model: str, measures: Measures, device: str, dtype: str, progress: Progress
) -> dict[str, Any]:
    """The figures of each measure that was asked for, as JSON has them: texts, tasks, kl_base, written, notes."""
    import bitfold

    options: dict[str, Any] = {"device": device, "dtype": dtype}

    def windows(done: int, total: int) -> None:
        progress(done, total, "window")

    texts = named_files(measures.text)
    if measures.write:
        assert measures.kl_base is not None
        (text,) = texts.values()
        written = bitfold.write_kl_base(
            model,
            text,
            measures.kl_base,
            sequence_length=measures.sequence_length,
            windows=measures.limit,
            progress=windows,
            **options,
        )
        return {"written": written.to_json()}
    found: dict[str, Any] = {}
    if texts:
        evaluation = bitfold.evaluate(
            model,
            texts,
            sequence_length=measures.sequence_length,
            against=measures.against,
            windows=measures.limit,
            progress=windows,
            **options,
        )
        found["texts"] = {name: row.to_json() for name, row in evaluation.texts.items()}
    if measures.tasks is not None:
        names = [name.strip() for name in measures.tasks.split(",")]
        scores = bitfold.evaluate_tasks(
            model,
            names,
            against=measures.against,
            limit=measures.limit,
            progress=progress,
            **options,
        )
        found |= {"tasks": scores.to_json(), "notes": list(scores.notes)}
    if measures.kl_base is not None:
        base = bitfold.evaluate_kl_base(
            model, measures.kl_base, windows=measures.limit, progress=windows, **options
        )
        found["kl_base"] = base.to_json()
    return found


def print_measures(found: dict[str, Any], json: bool) -> None:
    """As tables, or as one JSON object, which for texts alone is their figures (of one text without its name)."""
    if json:
        texts = found.get("texts", {})
        if found.keys() == {"texts"}:
            found = next(iter(texts.values())) if len(texts) == 1 else texts
        terminal.print_json(found)
        return
    console = terminal.console()
    if "written" in found:
        console.print(escape(measured.written_sentence(found["written"])))
    if "texts" in found:
        console.print(measured.evaluation_table(found["texts"]))
    if "tasks" in found:
        console.print(measured.tasks_table(found["tasks"]))
    if "kl_base" in found:
        console.print(measured.kl_base_table(found["kl_base"]))
    for note in found.get("notes", ()):
        console.print(f"[yellow]note[/] {escape(note)}")


def named_files(items: Sequence[str]) -> dict[str, str | Path]:
    """`[NAME=]FILE` items; the name is the file's stem without one."""
    named: dict[str, str | Path] = {}
    for item in items:
        name, equals, file = item.partition("=")
        if not equals or Path(item).is_file():
            name, file = Path(item).stem, item
        if not name or not file:
            raise DataError(f"The text '{item}' lacks a name or a file: write --text [NAME=]FILE.")
        if name in named:
            raise DataError(f"Two texts are named '{name}': write --text NAME=FILE.")
        named[name] = Path(file)
    return named
