"""The command line: parses, calls the library, prints. It adds nothing that Python cannot do."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bitfold.cli.formats import export, import_
from bitfold.cli.looking import demo, generate, inspect, recipes
from bitfold.cli.measuring import eval, verify
from bitfold.cli.quantizing import quantize
from bitfold.cli.training import train
from bitfold.errors import did_you_mean
from bitfold.report.ending import USAGE_ERROR, ending
from bitfold.version import VERSION

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """A misspelt command is answered with the nearest right one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            raise USAGE_ERROR(f"There is no command '{name}': {did_you_mean(name, self.commands)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes language models small enough for the machine in front of you.\n\n"
    "Start with [bold]bitfold demo[/], then: bitfold quantize MODEL -o OUT",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Options of the whole."""


def _add(command: Any, example: str, name: str | None = None) -> None:
    app.command(name, epilog=f"Example: bitfold {example}")(command)


_add(quantize, "quantize ./llama-3.2-1b -o ./llama-w4 --method awq --scheme w4a16g128")
_add(
    eval,
    "eval ./llama-w4 --text wiki.test.txt --tasks arc_easy,mine.jsonl --against ./llama-3.2-1b",
)
_add(verify, "verify ./llama-w4")
_add(export, "export ./llama-w4 --to gguf -o llama-w4.gguf")
_add(import_, "import ./llama-gptq -o ./llama-w4", name="import")
_add(inspect, "inspect ./llama-w4")
_add(recipes, "recipes awq")
_add(generate, 'generate ./llama-w4 --prompt "Once upon a time" --max-new-tokens 40')
_add(demo, "demo")
app.add_typer(train, name="train")


def main() -> None:
    """Entry point: errors that are the input's or the machine's become one sentence and exit code 1."""
    ending(lambda: app(standalone_mode=False, prog_name="bitfold"))
