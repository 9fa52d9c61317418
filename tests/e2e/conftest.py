"""Whole commands: run in this process, which is quick, or in one of their own, which is what a user does."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Outcome, Run

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`bitfold` in this process."""

    def call(line: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["bitfold", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def run_process() -> Run:
    """`python -m bitfold` in a process of its own."""

    def call(line: str) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "bitfold", *shlex.split(line)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model, to be changed at will."""
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration for the models of `models_zoo`: 8 windows of 24 of their 96 tokens."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(0, 96, (8, 24)))
    return file


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the embedded model by rtn, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "artifact"
    bitfold.quantize(DEMO_MODEL, out, method="rtn")
    return out


@pytest.fixture
def artifact(finished: Path, tmp_path: Path) -> Path:
    """The same, to be changed at will."""
    return Path(shutil.copytree(finished, tmp_path / "artifact"))
