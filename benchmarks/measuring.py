"""What the tables of quality share: artifacts made in a process of their own, their figures, and rows that outlive a
killed command."""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from children import bitfold_json, machine, source_version

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Asked",
    "Measure",
    "Row",
    "Rows",
    "add_measuring_arguments",
    "command_line",
    "markdown_table",
    "measure_of",
    "provenance",
    "quantize_and_measure",
    "settings_of",
    "show_table",
    "write_results",
]

Row = dict[str, Any]

_KEPT = (
    "bits_per_weight",
    "size_bytes",
    "seconds",
    "process_seconds",
    "process_cpu_seconds",
    "peak_rss_mb",
    "format",
    "online",
    "notes",
)


@dataclass(frozen=True)
class Asked:
    """What `bitfold quantize` is asked for, as its --method, --effort, --scheme, --bits and --set say it."""

    method: str
    scheme: str
    set: tuple[str, ...] = ()
    effort: str | None = None
    bits: str | None = None

    @classmethod
    def parse(cls, method: str, scheme: str, *set: str) -> "Asked":
        """Either may bring its own settings; `effort=high` is --effort, `bits=2.5` is --bits.

        >>> Asked.parse("awq:awq.steps=10,awq.weight_aware=false", "w8a8:activation.static=true").set
        ('activation.static=true', 'awq.steps=10', 'awq.weight_aware=false')
        """
        name, _, of_method = method.partition(":")
        notation, _, of_scheme = scheme.partition(":")
        own = [item for item in f"{of_scheme},{of_method}".split(",") if item]
        options = dict(item.split("=", 1) for item in own if item.startswith(("effort=", "bits=")))
        own = [item for item in own if not item.startswith(("effort=", "bits="))]
        return cls(name, notation, (*own, *set), options.get("effort"), options.get("bits"))

    @property
    def arguments(self) -> list[str]:
        """For the command line."""
        pairs = [part for item in self.set for part in ("--set", item)]
        effort = [] if self.effort is None else ["--effort", self.effort]
        bits = [] if self.bits is None else ["--bits", self.bits]
        return ["--method", self.method, *effort, "--scheme", self.scheme, *bits, *pairs]

    def recipe(self) -> Row:
        """The recipe in full: it changes with the defaults."""
        from bitfold import Recipe

        recipe = Recipe.make(self.method, self.scheme, set=self.set, effort=self.effort)
        return recipe.model_dump(mode="json")


class Rows:
    """Finished rows in a file of JSON lines: the same command goes on where it was stopped."""

    def __init__(self, file: Path, identity: Sequence[str]) -> None:
        """identity: the keys of a row that say what it is of."""
        self._file, self._identity = file, identity
        lines = file.read_text().splitlines() if file.is_file() else []
        self._known = {self._key(row): row for row in map(json.loads, lines)}

    def get(self, of: Row, make: Callable[[], Row], label: str) -> Row:
        """The row of `of`, which has the keys of the identity; made, and kept at once, unless it is there."""
        key = self._key(of)
        if key not in self._known:
            start = time.perf_counter()
            row = of | {"bitfold": source_version(), "machine": machine()} | make()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            self._known[key] = row
            seconds = time.perf_counter() - start
            print(f"{label}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return self._known[key]

    def find(self, of: Row) -> Row | None:
        """The row of `of`, where it is there."""
        return self._known.get(self._key(of))

    def _key(self, row: Row) -> str:
        return json.dumps([row.get(name) for name in self._identity], sort_keys=True)


class Measure:
    """Evaluates models on texts, by name, against an original that is loaded once, when it is first needed."""

    def __init__(
        self,
        original: Path,
        texts: Mapping[str, str | Path],
        windows: Mapping[str, int],
        length: int,
        tokenizer: Path | None = None,
    ) -> None:
        """windows: only the first so many of a text's. length: tokens of a window. tokenizer: the checkpoint whose
        tokenizer cuts the texts, where that is not each model's own."""
        self.path, self.texts, self.windows, self.length = original, texts, windows, length
        self._tokenizer_of = tokenizer

    @cached_property
    def original(self) -> "PreTrainedModel":
        import bitfold

        return remembering(bitfold.load(self.path))

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase | None":
        import bitfold

        return None if self._tokenizer_of is None else bitfold.load_tokenizer(self._tokenizer_of)

    def __call__(self, model: Path, *, compare: bool) -> dict[str, Any]:
        """The figures of every text, by its name."""
        import bitfold

        return {
            name: bitfold.evaluate(
                model,
                file,
                tokenizer=self.tokenizer,
                sequence_length=self.length,
                windows=self.windows.get(name),
                against=self.original if compare else None,
            ).to_json()
            for name, file in self.texts.items()
        }


def remembering(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model, which keeps the logits of every batch it is given: it is asked for the same ones row after row."""
    compute, known = model.forward, {}

    def forward(input_ids: "Tensor", **options: Any) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in known:
            known[key] = compute(input_ids=input_ids, **options)
        return known[key]

    model.forward = forward
    return model


def quantize_and_measure(
    measure: Measure,
    asked: Asked,
    calibration: Path | str,
    samples: int,
    look: Callable[[Path], Row] = lambda artifact: {},
) -> Row:
    """What `bitfold quantize` makes of the original, what that costs and is worth.

    look: adds what is read in the artifact, which is removed afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="bitfold-measuring-") as directory:
        out = Path(directory) / "artifact"
        calibrating = ("--calibration", calibration, "--samples", str(samples))
        made = bitfold_json("quantize", measure.path, "-o", out, *asked.arguments, *calibrating)
        row = {key: made[key] for key in _KEPT} | look(out)
        row["texts"] = measure(out, compare=True)
        shutil.rmtree(out)
    return row


# -- commands that measure on one text ---------------------------------------------------------------


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of calibrating and measuring."""
    add = parser.add_argument
    add("--calibration", type=Path, required=True, help=".txt, .jsonl or .npy")
    add("--text", type=Path, required=True, help="evaluation text")
    add("--windows", type=int, help="only the text's first so many windows")
    add("--length", type=int, default=256, help="tokens of an evaluation window")


def settings_of(options: argparse.Namespace) -> Row:
    """What a row's figures depend on beside checkpoint and recipe."""
    return {
        "text": options.text.name,
        "windows": options.windows,
        "length": options.length,
        "calibration": options.calibration.name,
    }


def measure_of(
    original: Path, options: argparse.Namespace, tokenizer: Path | None = None
) -> Measure:
    """A `Measure` on the text of `add_measuring_arguments`."""
    name = options.text.stem
    windows = {} if options.windows is None else {name: options.windows}
    return Measure(original, {name: options.text}, windows, options.length, tokenizer)


# -- results -----------------------------------------------------------------------------------------


def command_line() -> str:
    """The command that runs, as a person would type it."""
    return "python " + shlex.join(sys.argv)


def write_results(out: Path, content: Row, page: str) -> None:
    """OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_suffix(".md").write_text(page)


def provenance(rows: Iterable[Row]) -> str:
    """With which bitfold, and where, the rows were made."""
    made = list(rows)
    used, where = ({row[key] for row in made} for key in ("bitfold", "machine"))
    return f"bitfold {', '.join(sorted(used))}; {'; '.join(sorted(where))}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Its lines; every column but the first is right-aligned."""
    align = [":--"] + ["--:"] * (len(header) - 1)
    return [f"| {' | '.join(line)} |" for line in (header, align, *rows)]


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The same table in the terminal; in a log as wide as it is."""
    from bitfold.report import terminal

    console = terminal.console()
    if not console.is_terminal:
        console.width = 200
    console.print(terminal.table(header, rows))
