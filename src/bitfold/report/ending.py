"""How a command ends: its exit code, and one sentence for whatever went wrong."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.markup import escape

from bitfold.errors import BitfoldError, did_you_mean
from bitfold.report import terminal

__all__ = ["USAGE_ERROR", "ending"]

# typer brings its own copy of click and exports only this leaf of its errors: the root is ClickException.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130
_OUT_OF_MEMORY = (
    "The memory ran out: take fewer --samples, a shorter --sequence-length or a narrower --dtype, "
    "or free memory and run the same command again, which goes on where it was."
)


def ending(command: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 0, 1 for a wrong input or machine, 2 for a wrong command line, 130 when interrupted."""
    wants_json = "--json" in sys.argv
    try:
        code = command() or 0
        if code == _INTERRUPTED:  # typer makes this of a KeyboardInterrupt
            _say_interrupted()
        sys.exit(code)
    except (typer.Abort, KeyboardInterrupt):
        _say_interrupted()
        sys.exit(_INTERRUPTED)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        _fail(_OUT_OF_MEMORY, "OutOfMemory", wants_json, code=1)
    except BitfoldError as error:
        _fail(str(error), type(error).__name__, wants_json, code=1)
    except USAGE_ERROR as error:
        if not error.format_message():  # no arguments: the help was shown
            sys.exit(2)
        _fail(str(BitfoldError(_usage_sentence(error))), "UsageError", wants_json, code=2)


def _say_interrupted() -> None:
    resumes = sys.argv[1:2] in (["quantize"], ["train"])
    more = ": the same command goes on where it was." if resumes else "."
    terminal.console(stderr=True).print(f"Interrupted{more}")


def _out_of_memory(error: Exception) -> bool:
    """Whether Python's, PyTorch's or CUDA's allocator gave up."""
    said = str(error)
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said


def _fail(sentence: str, kind: str, wants_json: bool, code: int) -> NoReturn:
    if wants_json:
        terminal.print_json({"error": sentence, "kind": kind})
    terminal.console(stderr=True).print(f"[bold red]Error:[/] {escape(sentence)}")
    sys.exit(code)


def _usage_sentence(error: Any) -> str:
    """What click says, and the mend: the nearest option, or where to read on."""
    if getattr(error, "ctx", None) is None:
        return str(error.format_message())
    command = error.ctx.command_path
    if hasattr(error, "possibilities"):  # of an option that there is not
        options = error.ctx.command.get_params(error.ctx)
        known = [name for option in options for name in option.opts if name.startswith("--")]
        return f"`{command}` has no option '{error.option_name}': {did_you_mean(error.option_name, known)}"
    return f"{error.format_message().rstrip('.')}: see `{command} --help`"
