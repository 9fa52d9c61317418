"""A script that runs in another Python: lines of progress come back, and it never outlives this process."""

import json
import os
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bitfold.errors import EngineError

__all__ = ["has_module", "resolve_python", "run_script", "say_shortly", "talking"]

Talk = tuple[Callable[[], Mapping[str, Any]], Callable[[str], None]]

# Of this process, not of the other one.
_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_FIND = "import importlib.util, sys; print(importlib.util.find_spec(sys.argv[1]) is not None)"


def resolve_python(python: str | Path) -> Path:
    """The interpreter's path; EngineError where there is none."""
    found = shutil.which(str(Path(python).expanduser()))
    if found is None:
        raise EngineError(
            f"There is no program {python}: give the python of the engine's environment, DIRECTORY/bin/python."
        )
    return Path(found).absolute()  # not resolved: a link is what tells Python its environment


def has_module(python: Path, module: str) -> bool:
    """Whether that Python has a module, without importing it; EngineError if it is no Python."""
    command = [str(python), "-I", "-c", _FIND, module]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=_environment()
        )
    except OSError as error:
        raise EngineError(f"{python} does not run ({error.strerror}): give a Python.") from error
    if done.stdout.strip() not in ("True", "False"):
        raise EngineError(
            f"{python} is no Python that works: give the python of the engine's environment."
        )
    return done.stdout.strip() == "True"


def run_script(
    python: Path,
    script: Path,
    arguments: Sequence[str | Path],
    log: Path,
    progress: Callable[[str], None],
) -> Mapping[str, Any]:
    """What the script says at last, {"done": …} or {"failed": …}; its stderr goes to `log`.

    Raises EngineError where it ends without saying so.
    """
    command = [str(python), "-I", str(script), *map(str, arguments)]
    with log.open("wb") as stream, _running(command, stream) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "doing" not in said:
                return said
            progress(said["doing"])
        code = process.wait()
    raise _ended(code, log)


@contextmanager
def talking(
    python: Path, script: Path, arguments: Sequence[str | Path], log: Path
) -> Iterator[Talk]:
    """A script that answers lines by lines, while it runs: what hears the next of its objects of JSON, and what sends
    it a line; its stderr goes to `log`.

    Hearing raises EngineError where it has ended.
    """
    command = [str(python), "-I", str(script), *map(str, arguments)]
    with log.open("wb") as stream, _running(command, stream) as process:
        heard, sent = process.stdout, process.stdin
        assert heard is not None
        assert sent is not None

        def hear() -> Mapping[str, Any]:
            for line in heard:
                said: Mapping[str, Any] = json.loads(line)
                return said
            raise _ended(process.wait(), log)

        def send(line: str) -> None:
            with suppress(BrokenPipeError):  # hearing says why
                # Not by the stream, which would keep what nobody takes, and fail at its end.
                os.write(sent.fileno(), f"{line}\n".encode())

        yield hear, send


def say_shortly(text: str) -> str:
    """What a library says, as a part of a sentence."""
    return textwrap.shorten(text, width=500, placeholder=" …").rstrip(".")


def _ended(code: int, log: Path) -> EngineError:
    return EngineError(
        f"The engine ended with exit code {code} and no answer ({_last_line(log)}): "
        "free memory if it ran out, or give another environment"
    )


@contextmanager
def _running(command: list[str], log: IO[bytes]) -> Iterator["subprocess.Popen[str]"]:
    """The process leads a group of its own, which is killed at the end, come what may. It ends by itself when its
    stdin does: that is, when this process is killed."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=_environment(),
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            _kill_group(process.pid)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OWN}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return say_shortly(lines[-1] if lines else "it said nothing")
