"""Bad circumstances that take some staging: full and read-only disks, a second run, no network; and real processes."""

import errno
import fcntl
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from commands import Run
from damage import poison

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import OutputError
from bitfold.pipeline import quantize as pipeline
from bitfold.pipeline import workdir
from bitfold.pipeline.job import Job

AWQ = "--method awq --samples 4 --sequence-length 64"


def refused(run: Run, line: str, *words: str) -> None:
    outcome = run(line)
    assert outcome.code == 1
    assert outcome.out == ""
    sentence = outcome.err.splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


# --- full disks ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 9 MB, where this process may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_disk_too_small_is_refused_before_anything_is_written(run: Run, disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(5_000_000))
    refused(
        run,
        f"quantize {DEMO_MODEL} --method rtn -o {disk}/out",
        "needs 6 MB",
        str(disk),
        "4 MB",
        "make room",
    )
    assert [file.name for file in disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_keeps_the_finished_blocks(run: Run, disk: Path) -> None:
    def fill(done: float, total: int, what: str) -> None:
        if done == 3:
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(free - 100_000))

    options = {"method": "awq", "samples": 4, "sequence_length": 64}
    with pytest.raises(
        OutputError, match=r"disk is full while writing .*make room and run the same"
    ):
        bitfold.quantize(DEMO_MODEL, disk / "out", progress=fill, **options)
    assert not (disk / "out").exists()
    assert not list(disk.rglob("writing"))
    (disk / "filler").unlink()
    assert run(f"quantize {DEMO_MODEL} -o {disk}/out {AWQ} --json").json["resumed_blocks"] == 3
    assert [file.name for file in disk.iterdir()] == ["out"]


def test_no_space_left(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without privileges: the fourth shard finds no room."""
    save, calls = workdir.save_file, iter(range(99))

    def full(tensors: object, file: Path, **options: object) -> None:
        if next(calls) == 3:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file, **options)

    line = f"quantize {DEMO_MODEL} -o {tmp_path}/out {AWQ}"
    with monkeypatch.context() as patch:
        patch.setattr(workdir, "save_file", full)
        refused(
            run, line, "disk is full", "model-00004-of-00007.safetensors", "the same command again"
        )
    assert [file.name for file in tmp_path.iterdir()] == [".out.partial"]
    assert run(f"{line} --json").json["resumed_blocks"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# --- places ---


def test_a_directory_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    """Root may write everywhere but where a file is immutable."""
    place = tmp_path / "place"
    place.mkdir()
    if subprocess.run(["chattr", "+i", str(place)], capture_output=True, check=False).returncode:
        pytest.skip(
            "the file system has no immutable directories, or setting them needs privileges"
        )
    try:
        refused(
            run, f"quantize {DEMO_MODEL} --method rtn -o {place}/out", str(place), "read-only", "-o"
        )
        assert not list(place.iterdir())
    finally:
        subprocess.run(["chattr", "-i", str(place)], check=True)


def test_a_second_run_at_the_same_place(run: Run, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(
            run,
            f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out",
            "Another bitfold run",
            f"{tmp_path}/out",
        )
        assert [file.name for file in partial.iterdir()] == ["lock"]
    assert run(f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out").code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


# --- names on a hub that is out of reach, or not asked ---


def test_a_hub_that_cannot_be_reached(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for command in (f"quantize org/name -o {tmp_path}/out", "inspect org/name", "verify org/name"):
        refused(run, command, "'org/name'", "hub could not be reached", "local directory")


# --- numbers that no dtype holds ---


@pytest.mark.parametrize("method", ["rtn", "wush"])
def test_activations_beyond_the_dtype(method: str, run: Run, model: Path, tmp_path: Path) -> None:
    """Finite weights of which float16 makes infinite activations: found at the block, and named."""
    poison("model.layers.3.mlp.down_proj.weight", 6e4)(model)
    poison("model.layers.3.post_attention_layernorm.weight", 6e4)(model)
    poison("model.layers.3.mlp.up_proj.weight", 6e4)(model)
    line = f"quantize {model} --method {method} -o {tmp_path}/out --dtype float16"
    if method != "rtn":
        line += " --samples 4 --sequence-length 32"
    refused(run, line, "model.layers.3", "not finite in float16", "--dtype")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


# --- runs that are broken off ---

BROKEN_OFF = [
    (KeyboardInterrupt(), 130, "Interrupted: the same command goes on where it was"),
    (MemoryError(), 1, "memory ran out"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "--samples"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        1,
        "run the same command again",
    ),
]


@pytest.mark.parametrize(("raised", "code", "words"), BROKEN_OFF)
def test_a_run_that_is_broken_off_goes_on(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    words: str,
) -> None:
    line = f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out"
    real = pipeline.step

    def step(job: Job, index: int, *arguments: Any) -> Any:
        if index == 4:
            raise raised
        return real(job, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "step", step)
        outcome = run(line)
    assert outcome.code == code
    assert words in outcome.err.splitlines()[-1]
    assert run(f"{line} --json").json["resumed_blocks"] == 4


# --- real processes ---


def test_processes_end_with_one_line_and_a_code(
    run_process: Run, model: Path, tmp_path: Path
) -> None:
    poison("model.layers.5.self_attn.o_proj.weight", torch.nan)(model)
    lines = {
        f"quantize {model} --method rtn -o {tmp_path}/out": (
            1,
            "model.layers.5.self_attn.o_proj.weight",
        ),
        f"quantize {model} -o {tmp_path}/out --methud rtn": (2, "'--method'"),
    }
    for line, (code, word) in lines.items():
        outcome = run_process(line)
        assert outcome.code == code
        assert outcome.out == ""
        assert word in outcome.err.splitlines()[-1]
        assert "Traceback" not in outcome.err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
