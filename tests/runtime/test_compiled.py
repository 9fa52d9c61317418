"""Kernels of C: made once, never half, and never needed."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bitfold.runtime import compiled
from bitfold.runtime.compiled import DISABLED, forget_kernels, kernel

pytestmark = pytest.mark.skipif(
    kernel("xnor").library is None and not os.environ.get(DISABLED),
    reason=f"no kernels on this machine: {kernel('xnor').why}",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(DISABLED, raising=False)
    forget_kernels()
    yield
    monkeypatch.undo()
    forget_kernels()


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "bitfold").iterdir())


def test_made_once_and_private(tmp_path: Path) -> None:
    found = kernel("xnor")
    assert isinstance(found.library, ctypes.CDLL)
    assert "compiled by" in found.why
    (file,) = files(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o700
    made = file.stat().st_mtime_ns
    forget_kernels()
    assert kernel("xnor").library is not None
    assert [f.stat().st_mtime_ns for f in files(tmp_path)] == [made]


def test_another_source_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel("xnor")
    sources = tmp_path / "sources"
    sources.mkdir()
    for file in compiled._SOURCES.iterdir():
        (sources / file.name).write_bytes(file.read_bytes())
    with (sources / "threads.h").open("a") as stream:
        stream.write("/* changed */\n")
    monkeypatch.setattr(compiled, "_SOURCES", sources)
    forget_kernels()
    assert kernel("xnor").library is not None
    assert len(files(tmp_path)) == 2


def test_half_a_file_is_made_again(tmp_path: Path) -> None:
    kernel("xnor")
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    # A process of its own: this one has the old file mapped.
    file.unlink()
    file.write_bytes(whole[:1000])
    os.chmod(file, 0o700)
    code = "from bitfold.runtime.compiled import kernel; print(kernel('xnor').why)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compiled by" in done.stdout
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({DISABLED: "1"}, f"{DISABLED} is set"),
        ({"CC": "no-such-compiler"}, "no C compiler (no-such-compiler)"),
        ({"CC": "false"}, "no C compiler (false)"),
        ({"XDG_CACHE_HOME": "/dev/null"}, "cache of kernels cannot be used"),
    ],
)
def test_none(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_kernels()
    found = kernel("xnor")
    assert found.library is None
    assert said in found.why


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "bad.c").write_text("int f(void) { return nothing; }\n")
    monkeypatch.setattr(compiled, "_SOURCES", sources)
    found = kernel("bad")
    assert found.library is None
    assert "fails on bad.c" in found.why
    assert "error" in found.why
    assert files(tmp_path) == []


def test_a_cache_of_others_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "bitfold").mkdir()
    os.chmod(tmp_path / "bitfold", 0o777)
    found = kernel("xnor")
    assert found.library is None
    assert "may write" in found.why


def test_processes_that_begin_together(tmp_path: Path) -> None:
    code = "from bitfold.runtime.compiled import kernel; assert kernel('xnor').library, kernel('xnor').why"
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(files(tmp_path)) == 1
