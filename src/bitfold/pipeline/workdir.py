"""The place where an artifact grows: a hidden sibling of the final directory.

    .OUT.partial/
        lock                    held by the run that works here
        state.json              the request, an entry for every finished block, one for learned bases and one for the
                                distillation
        bases.safetensors       the bases that were learned before the first block
        streams-00003.safetensors   the activation streams as they stand before block 3
        distilled.safetensors   what distillation learned, which is then put into the shards
    artifact/               becomes OUT
        replaced/               an earlier OUT, between the two renames that replace it
        writing                 the file that is being written at this moment

A kill at any moment leaves a state from which the run goes on: every file is written under the name `writing` and
renamed when it is whole, the streams' name says which state they belong to, and OUT appears by a rename.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitfold.errors import OutputError

__all__ = ["MARKER", "Workdir", "existing_parent", "finished_request", "refuse_foreign", "writing"]

MARKER = "provenance.json"
_LOCK = "lock"

_Entry = dict[str, Any]


class Workdir:
    """The growing artifact. `path` is its directory, `blocks` the entries of the blocks that are finished, `bases` that
    of learned bases once they are recorded, `distilled` that of the distillation: from then on shards may hold what was
    learned."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.root = out.parent / f".{out.name}.partial"
        self.path = self.root / "artifact"
        self.learned = self.root / "distilled.safetensors"
        self.learned_bases = self.root / "bases.safetensors"
        self.blocks: list[dict[str, Any]] = []
        self.bases: dict[str, Any] | None = None
        self.distilled: dict[str, Any] | None = None

    @property
    def streams(self) -> Path:
        """The streams before the first block that is not finished."""
        return self.root / f"streams-{len(self.blocks):05d}.safetensors"

    @contextmanager
    def opened(self, request: str) -> Iterator["Workdir"]:
        """Take the directory for this run; `blocks` are those that an earlier run of the same request finished.

        Raises OutputError when another process works there, or it cannot be written.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / _LOCK).open("w")
        with lock:
            self._take(lock)
            with writing(self.path):
                self.path.mkdir(exist_ok=True)
            self._request = request
            self.blocks, self.bases, self.distilled = self._read_state()
            yield self

    def restart(self, *, keep_bases: bool = False) -> None:
        """Forget what an earlier run left, its state first: the rest means nothing without it.

        keep_bases: but learned bases, where there are any.
        """
        self.blocks, self.distilled = [], None
        kept = {_LOCK}
        if keep_bases and self.bases is not None:
            kept |= {self.learned_bases.name, "state.json"}
            self._write_state()
        else:
            self.bases = None
            with writing(self.root):
                (self.root / "state.json").unlink(missing_ok=True)
        with writing(self.root):
            for entry in self.root.iterdir():
                if entry.name not in kept:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self.path.mkdir()

    def finish_bases(self, entry: Mapping[str, Any], bases: Mapping[str, Tensor]) -> None:
        """Record bases that were learned before the first block."""
        self._write(self.learned_bases, lambda file: save_file(dict(bases), file))
        self.bases = dict(entry)
        self._write_state()

    def finish_block(self, entry: Mapping[str, Any], save_streams: Callable[[Path], None]) -> None:
        """Record a block whose shard is written.

        The state decides which streams count: a kill before it is written leaves new ones that are written again, a
        kill after it old ones that nobody reads.
        """
        before = self.streams
        self.blocks.append(dict(entry))
        self._write(self.streams, save_streams)
        self._write_state()
        before.unlink(missing_ok=True)

    def finish_distillation(self, entry: Mapping[str, Any], learned: Mapping[str, Tensor]) -> None:
        """Record a distillation, and the tensors that it learned; no shard is changed before that."""
        self._write(self.learned, lambda file: save_file(dict(learned), file))
        self.distilled = dict(entry)
        self._write_state()

    def write_text(self, name: str, text: str) -> None:
        """Write a small file of the artifact."""
        self._write(self.path / name, lambda file: file.write_text(text, encoding="utf-8"))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard of the artifact."""
        contiguous = {key: tensors[key].cpu().contiguous() for key in sorted(tensors)}

        def save(file: Path) -> None:
            save_file(contiguous, file, metadata={"format": "pt"})
            file.chmod(0o644)  # safetensors makes it readable for its owner alone

        self._write(self.path / name, save)

    def publish(self) -> None:
        """Give the finished artifact its name, in place of an earlier one."""
        with writing(self.out):
            if self.out.exists():
                replaced = self.root / "replaced"
                shutil.rmtree(replaced, ignore_errors=True)
                self.out.rename(replaced)
            self.path.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove all of it: it is published, or running again would only repeat the error."""
        shutil.rmtree(self.root, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what a kill just after the artifact got its name left behind."""
        if not self.path.exists():
            self.discard()

    def _take(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended just now has removed the file that was opened.
            free = os.path.samestat(os.fstat(lock.fileno()), (self.root / _LOCK).stat())
        except OSError:
            free = False
        if not free:
            raise OutputError(
                f"Another bitfold run is writing {self.out}: wait for it, or choose another -o."
            )

    def _read_state(self) -> tuple[list[_Entry], _Entry | None, _Entry | None]:
        """The entries of finished blocks, of bases and of the distillation; none where the state is missing, damaged
        or of another request."""
        try:
            state = json.loads((self.root / "state.json").read_text(encoding="utf-8"))
            if state["request"] != self._request:
                return [], None, None
            blocks: list[_Entry] = state["blocks"]
            return blocks, state.get("bases"), state.get("distilled")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [], None, None

    def _write_state(self) -> None:
        parts = {"bases": self.bases, "distilled": self.distilled}
        found = {name: entry for name, entry in parts.items() if entry is not None}
        state = json.dumps({"request": self._request, "blocks": self.blocks} | found)
        self._write(self.root / "state.json", lambda file: file.write_text(state, encoding="utf-8"))

    def _write(self, file: Path, save: Callable[[Path], object]) -> None:
        """Write a file whole or not at all."""
        temporary = self.root / "writing"
        with writing(file):
            try:
                save(temporary)
                temporary.replace(file)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write into one clear sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            free = shutil.disk_usage(existing_parent(what)).free / 1e6
            raise OutputError(
                f"The disk is full while writing {what} ({free:.0f} MB free): make room and run the same command "
                "again, it goes on after the last finished block; or choose an -o on another disk."
            ) from error
        reason = os.strerror(code) if code else str(error)
        raise OutputError(f"{what} cannot be written ({reason}): choose another -o.") from error


def refuse_foreign(out: Path) -> None:
    """Raises OutputError unless `out` is free and can be made, or is an artifact that bitfold made."""
    with writing(out):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputError(f"{out} exists and is no directory: choose another -o.")
        if out.is_dir() and finished_request(out) is None:
            raise OutputError(
                f"{out} exists and was not made by bitfold: choose another -o, or remove it."
            )
        root = Workdir(out).root
        if root.exists() and not (root / _LOCK).exists() and any(root.iterdir()):
            raise OutputError(
                f"{root}, where bitfold would work, was not made by bitfold: choose another -o, or remove it."
            )
        parent = existing_parent(out)
        if not parent.is_dir():
            raise OutputError(
                f"{out} cannot be made, because {parent} is no directory: choose another -o."
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(
                f"{out} cannot be made, because {parent} is read-only: choose another -o."
            )


def finished_request(out: Path) -> str | None:
    """What the artifact at `out` was made from, as a hash; None if there is none."""
    try:
        provenance = json.loads((out / MARKER).read_text(encoding="utf-8"))
        request = provenance["bitfold"]["request"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return request if isinstance(request, str) else None


def existing_parent(path: Path) -> Path:
    """The nearest directory above `path` that is there."""
    return next(parent for parent in path.parents if parent.exists())
