"""A run may be killed at any moment, and goes on to the bytes of an uninterrupted one."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import cut, flip_byte, write

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.pipeline import streams, workdir
from models_zoo import TOKENS, Zoo

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
OPERATIONS = ("replace", "rename", "unlink", "mkdir", "write_text", "rmdir")


class Killed(BaseException):
    """What a process that is killed does not notice."""


class Death:
    """Kills at the nth change to the file system, half-way through where it writes; nothing happens afterwards."""

    def __init__(self, patch: pytest.MonkeyPatch, moment: int) -> None:
        self.left = moment
        for name in OPERATIONS:
            patch.setattr(pathlib.Path, name, self.instead_of(getattr(pathlib.Path, name)))
        for module in (workdir, streams):
            patch.setattr(module, "save_file", self.instead_of(module.save_file))
        patch.setattr(shutil, "rmtree", self.instead_of(shutil.rmtree))

    def instead_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        writes = {"write_text": 0, "save_file": 1}.get(function.__name__)

        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left >= 0:
                return function(*arguments, **options)
            if self.left == -1 and writes is not None:
                arguments[writes].write_bytes(b"half")
            raise Killed

        return call


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, TOKENS.repeat(4, 1).numpy())
    return path


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.iterdir())}


def quantize(model: Path, out: Path, ids: Path, **options: Any) -> bitfold.Quantization:
    settings = {"method": "awq", "scheme": "w4a16g32", "calibration": ids} | options
    made = bitfold.quantize(model, out, **settings)
    assert isinstance(made, bitfold.Quantization)
    return made


@pytest.mark.parametrize("replacing", [False, True])
def test_every_moment(
    checkpoint: Zoo, tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    """A death before each change to the file system; where an older artifact is replaced, before the last ones."""
    model = checkpoint("llama", torch.float32)
    with monkeypatch.context() as patch:
        death = Death(patch, 999)
        quantize(model, tmp_path / "whole", ids)
        changes = 999 - death.left
    expected = contents(tmp_path / "whole")
    quantize(model, tmp_path / "older", ids, scheme="w8a16")
    older = contents(tmp_path / "older")
    kept = []
    for moment in range(changes - 8 if replacing else 0, changes):
        out = tmp_path / "cut" / "out"
        out.parent.mkdir()
        if replacing:
            shutil.copytree(tmp_path / "older", out)
        with monkeypatch.context() as patch:
            Death(patch, moment)
            with pytest.raises(Killed):
                quantize(model, out, ids, overwrite=replacing)
        if out.exists():  # never half an artifact under its name
            assert contents(out) in ([older, expected] if replacing else [expected])
        overwrite = out.exists() and contents(out) == older
        kept.append(quantize(model, out, ids, overwrite=overwrite).resumed_blocks)
        assert contents(out) == expected
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out.parent)
    assert kept == sorted(kept)  # no later death loses what an earlier one kept
    assert set(kept) == ({2} if replacing else {0, 1, 2})


def stop_after(blocks: int) -> Callable[[float, int, str], None]:
    def progress(done: float, total: int, what: str) -> None:
        if what.startswith(f"block {blocks + 1} "):
            raise Killed

    return progress


@pytest.fixture
def killed(checkpoint: Zoo, tmp_path: Path, ids: Path) -> tuple[Path, Path]:
    """A model, and the place of a run that was killed after its first block."""
    model = Path(shutil.copytree(checkpoint("llama", torch.float32), tmp_path / "model"))
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", ids, progress=stop_after(1))
    return model, tmp_path / "out"


def partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def fresh(model: Path, ids: Path, **options: Any) -> dict[str, bytes]:
    quantize(model, model.parent / "fresh", ids, **options)
    return contents(model.parent / "fresh")


def test_a_killed_run_goes_on(killed: tuple[Path, Path], ids: Path) -> None:
    model, out = killed
    assert quantize(model, out, ids).resumed_blocks == 1
    assert contents(out) == fresh(model, ids)


def test_a_killed_run_starts_afresh_when_asked(killed: tuple[Path, Path], ids: Path) -> None:
    model, out = killed
    assert quantize(model, out, ids, resume=False).resumed_blocks == 0
    assert contents(out) == fresh(model, ids)


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w3a16g32"},
        {"set": "awq.steps=3"},
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"samples": 3},
    ],
    ids=str,
)
def test_another_request_does_not_go_on(
    killed: tuple[Path, Path], ids: Path, options: dict[str, Any]
) -> None:
    model, out = killed
    assert quantize(model, out, ids, **options).resumed_blocks == 0
    assert contents(out) == fresh(model, ids, **options)


def test_another_calibration_does_not_go_on(killed: tuple[Path, Path], tmp_path: Path) -> None:
    model, out = killed
    np.save(tmp_path / "other.npy", TOKENS.flip(1).numpy())
    assert quantize(model, out, tmp_path / "other.npy").resumed_blocks == 0
    assert contents(out) == fresh(model, tmp_path / "other.npy")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_another_source_does_not_go_on(killed: tuple[Path, Path], ids: Path, name: str) -> None:
    model, out = killed
    if name.endswith("json"):
        content = json.loads((model / name).read_text()) | {"bos_token_id": 5}
        (model / name).write_text(json.dumps(content))
    else:
        flip_byte(name, "model.layers.1.mlp.up_proj.weight")(model)
    assert quantize(model, out, ids).resumed_blocks == 0
    assert contents(out) == fresh(model, ids)


@pytest.mark.parametrize(
    "damage",
    [
        cut("streams-00001.safetensors"),
        lambda root: (root / "streams-00001.safetensors").unlink(),
        cut("state.json"),
        write("state.json", "[]"),
        write("state.json", '{"request": 1, "blocks": 2}'),
        cut("artifact/model-00002-of-00003.safetensors"),
        lambda root: (root / "artifact" / "model-00002-of-00003.safetensors").unlink(),
        flip_byte(
            "artifact/model-00002-of-00003.safetensors",
            "model.layers.0.mlp.up_proj.weight_packed",
        ),
    ],
    ids=[
        "streams",
        "no streams",
        "state",
        "odd state",
        "state of others",
        "shard",
        "no shard",
        "bit",
    ],
)
def test_damage_starts_afresh(
    killed: tuple[Path, Path],
    ids: Path,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = killed
    damage(partial(out))
    assert quantize(model, out, ids).resumed_blocks == 0
    assert contents(out) == fresh(model, ids)
    assert capsys.readouterr() == ("", "")


def test_a_fit_by_gradient_goes_on(checkpoint: Zoo, tmp_path: Path, ids: Path) -> None:
    """Its figures are in the report: they must not say how long it took."""
    model = Path(shutil.copytree(checkpoint("llama", torch.float32), tmp_path / "model"))
    options = {"method": "affine", "set": "affine.epochs=2"}
    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", ids, progress=stop_after(1), **options)
    assert quantize(model, tmp_path / "out", ids, **options).resumed_blocks == 1
    assert contents(tmp_path / "out") == fresh(model, ids, **options)


def test_kill_nine() -> None:
    """Two of what the benchmark does twenty times, on the embedded model."""
    command = [sys.executable, str(BENCHMARK), str(DEMO_MODEL), "--kills", "2", "--json"]
    command += ["--samples", "4", "--sequence-length", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["differing"] for row in rows] == [[], []]
    assert any(row["resumed"] > 0 for row in rows)
