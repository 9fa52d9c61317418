"""C kernels that the machine's own compiler makes, once, when they are first wanted.

Their source lies beside this file, in `kernels`. `kernel("xnor")` compiles `kernels/xnor.c` for this very processor
into the user's cache (`$XDG_CACHE_HOME/bitfold`, else `~/.cache/bitfold`), under a name that is a hash of all that it
depends on, and loads it. Where there is no compiler, where it fails, where the cache cannot be written and where the
environment has `BITFOLD_NO_KERNELS=1`, there is none: `kernel` says why, and whoever asks goes on in plain PyTorch.

Kernels start threads of their own, at most `torch.get_num_threads()`, which end before they return. So they share no
pool with PyTorch's OpenMP, and a fork finds nothing that could hang.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DISABLED", "Kernel", "forget_kernels", "kernel"]

DISABLED = "BITFOLD_NO_KERNELS"
"""The environment's variable that, where it is 1, has everything run in plain PyTorch."""
_SOURCES = Path(__file__).parent / "kernels"
# A multiplication and an addition stay two roundings, as in PyTorch's passes.
_FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")
_SECONDS = 120
_PROBE = "bitfold_probe"
_DIGEST = 32


class _NoKernelError(Exception):
    """Why there is none, as the end of a sentence."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that was asked for.

    library: loaded, or None where plain PyTorch runs instead. why: which compiler made it, or why there is none.
    """

    name: str
    library: ctypes.CDLL | None
    why: str


_lock = threading.Lock()
_known: dict[str, Kernel] = {}


def kernel(name: str) -> Kernel:
    """The kernels of `kernels/NAME.c`: compiled, if need be, and loaded, once in a process; from any thread.

    Never raises for what a machine lacks: `Kernel.why` says it.

    >>> kernel("xnor").library is kernel("xnor").library
    True
    """
    found = _known.get(name)
    if found is None:
        with _lock:
            found = _known.get(name)
            if found is None:
                found = _known[name] = _make(name)
    return found


def forget_kernels() -> None:
    """Ask again at the next call, for an environment that has changed."""
    with _lock:
        _known.clear()


def _make(name: str) -> Kernel:
    try:
        library, compiler = _load(name)
    except _NoKernelError as error:
        return Kernel(name, None, f"plain PyTorch: {error}")
    return Kernel(name, library, f"compiled by {compiler}")


def _load(name: str) -> tuple[ctypes.CDLL, str]:
    if os.environ.get(DISABLED, "") not in ("", "0"):
        raise _NoKernelError(f"{DISABLED} is set")
    if sys.platform != "linux":
        raise _NoKernelError("kernels are compiled on Linux only")
    compiler, version = _compiler()
    source = _SOURCES / f"{name}.c"
    parts = [source, *sorted(_SOURCES.glob("*.h"))]
    text = b"\0".join(part.read_bytes() for part in parts)
    flags = [*_FLAGS, *_for_this_processor()]
    facts = [shlex.join(compiler), version, *flags, _processor()]
    digest = hashlib.sha256(b"\0".join([text, *(fact.encode() for fact in facts)])).hexdigest()
    try:
        cache = _cache()
        file = cache / f"{name}-{digest[:24]}.so"
        if not _is_whole(file):
            _compile([*compiler, *flags], source, file)
        _refuse_others(file)
    except OSError as error:
        raise _NoKernelError(f"the cache of kernels cannot be used ({error})") from error
    try:
        return _checked(file), version
    except (OSError, AttributeError) as error:
        raise _NoKernelError(f"what was compiled cannot be loaded ({error})") from error


def _is_whole(file: Path) -> bool:
    """Whether it is there and ends with its own digest: a file cut short would end the process that loads it."""
    if not file.is_file():
        return False
    content = file.read_bytes()
    return _digest(content[:-_DIGEST]) == content[-_DIGEST:]


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _checked(file: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(file))
    getattr(library, _PROBE)  # AttributeError for a library that is another one's
    return library


def _compiler() -> tuple[list[str], str]:
    """Its command, and the first line of what it says of itself."""
    asked = os.environ.get("CC", "").strip()
    for command in [shlex.split(asked)] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]) is None:
            continue
        try:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, text=True, timeout=_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0 and done.stdout.strip():
            return command, done.stdout.strip().splitlines()[0]
    raise _NoKernelError(f"there is no C compiler ({asked or 'cc'}) that runs")


def _for_this_processor() -> list[str]:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


def _processor() -> str:
    """The model, and what it can do: a cache may be shared by machines."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in lines if line.startswith(wanted))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # Of a relative path the standard says that it is to be ignored.
    directory = (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "bitfold"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_others(directory)
    return directory


def _refuse_others(path: Path) -> None:
    """Code is loaded only from where nobody else can have put it."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        raise _NoKernelError(f"others than its user may write to {path}")


def _compile(command: list[str], source: Path, file: Path) -> None:
    """Written beside its place and renamed, so that a process never meets half a file."""
    handle, unfinished = tempfile.mkstemp(prefix=f".{file.stem}-", suffix=".so", dir=file.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*command, "-o", unfinished, str(source)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if done.returncode != 0:
            said = (done.stderr.strip() or "it says nothing").splitlines()
            first = next((line for line in said if "error" in line), said[0])
            raise _NoKernelError(f"{command[0]} fails on {source.name}: {first}")
        digest = _digest(Path(unfinished).read_bytes())
        with open(unfinished, "ab") as stream:
            stream.write(digest)
        os.chmod(unfinished, 0o700)
        os.replace(unfinished, file)
    except subprocess.SubprocessError as error:
        raise _NoKernelError(f"{command[0]} did not end on {source.name}: {error}") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)
