"""The place where an artifact grows: a hidden sibling of the final directory, renamed when it is whole.

Everything here is written to a temporary name first and renamed, so that a kill at any moment leaves a state from
which the run goes on, and the final name is never carried by something half-written.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitfold.errors import OutputError

__all__ = ["MARKER", "Workdir", "finished_request", "refuse_foreign", "writing"]

MARKER = "provenance.json"
_STATE = "state.json"
_STREAMS = "streams.safetensors"
_OWN = (_STATE, _STREAMS, "lock")


class Workdir:
    """The growing artifact. `path` is its directory; `done` the number of blocks that are finished."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f".{out.name}.partial"
        self.streams = self.path / _STREAMS
        self.done = 0
        self.blocks: list[dict[str, Any]] = []
        self.resumed = 0

    @contextmanager
    def opened(self, request: str, *, resume: bool) -> Iterator["Workdir"]:
        """Take the directory for this run; what an earlier run of the same request left is kept if `resume`.

        Raises OutputError when another process works there or it cannot be written.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise OutputError(
                f"Another bitfold run is writing {self.out}: wait for it, or choose another -o."
            ) from error
        with lock:
            state = self._read_state()
            if resume and state.get("request") == request:
                self.done, self.blocks = len(state["blocks"]), state["blocks"]
                self.resumed = self.done
            else:
                self._clear()
            self._request = request
            yield self

    def finish_block(self, entry: Mapping[str, Any]) -> None:
        """Record a block whose shard and streams are written."""
        self.blocks.append(dict(entry))
        self.done += 1
        self.write_text(_STATE, json.dumps({"request": self._request, "blocks": self.blocks}))

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""
        with writing(self.path / name):
            temporary = self.path / f"{name}.writing"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path / name)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard whole or not at all."""
        with writing(self.path / name):
            temporary = self.path / f"{name}.writing"
            contiguous = {key: tensors[key].cpu().contiguous() for key in sorted(tensors)}
            save_file(contiguous, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)  # safetensors makes it readable for its owner alone
            temporary.replace(self.path / name)

    def publish(self) -> None:
        """Give the finished artifact its name, in place of an earlier one."""
        for name in _OWN:
            (self.path / name).unlink(missing_ok=True)
        with writing(self.out):
            if self.out.exists():
                old = self.out.parent / f".{self.out.name}.replaced"
                shutil.rmtree(old, ignore_errors=True)
                self.out.rename(old)
                self.path.rename(self.out)
                shutil.rmtree(old)
            else:
                self.path.rename(self.out)

    def discard(self) -> None:
        """Remove all of it: after an error that running again would only repeat."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _read_state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((self.path / _STATE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return {}
        return state

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into one clear sentence, and removes the half-written file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        what.with_name(f"{what.name}.writing").unlink(missing_ok=True)
        code = getattr(error, "errno", None)
        text = str(error)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            free = shutil.disk_usage(_existing(what)).free / 1e9
            raise OutputError(
                f"The disk is full while writing {what} ({free:.2f} GB free): make room and run the same command "
                "again, it goes on after the last finished block; or choose an -o on another disk."
            ) from error
        if code in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise OutputError(
                f"{what} cannot be written ({os.strerror(code)}): choose another -o."
            ) from error
        raise OutputError(f"{what} cannot be written ({text}).") from error


def refuse_foreign(out: Path) -> None:
    """Raises OutputError unless `out` is free, or an artifact that bitfold made."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is no directory: choose another -o.")
    if out.is_dir() and _request_of(out) is None:
        raise OutputError(
            f"{out} exists and was not made by bitfold: choose another -o, or remove it."
        )


def finished_request(out: Path) -> str | None:
    """What the artifact at `out` was made from, as a hash; None if there is none."""
    return _request_of(out) if out.is_dir() else None


def _request_of(out: Path) -> str | None:
    try:
        provenance = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    request = provenance.get("bitfold", {}).get("request") if isinstance(provenance, dict) else None
    return request if isinstance(request, str) else None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
