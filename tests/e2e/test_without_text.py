"""`--calibration generate` and `random`: no text is read, and what that costs is said."""

import json
from pathlib import Path

import pytest
from commands import Run

from bitfold.assets import DEMO_MODEL


@pytest.mark.parametrize("word", ["generate", "random"])
def test_a_run_without_text(word: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"quantize {DEMO_MODEL} -o {out} --method gptq --scheme w4a16g64 --samples 4"
    found = run(f"{line} --sequence-length 48 --calibration {word} --json")
    assert found.code == 0, found.err
    report = json.loads((out / "report.json").read_text())
    real, own = report["probe"]["kl_by_window"]
    (note,) = [note for note in report["notes"] if note.startswith("Calibrated without text")]
    assert f"{real:.4f}" in note
    assert f"{own:.4f}" in note
    assert "embedded excerpt" in note
    provenance = json.loads((out / "provenance.json").read_text())
    assert "4 windows of 48" in provenance["calibration"]["source"]
    assert run(f"verify {out}").code == 0


def test_it_stands_for_itself(run: Run, tmp_path: Path) -> None:
    line = f"quantize {DEMO_MODEL} -o {tmp_path / 'out'} --method gptq --calibration generate"
    found = run(f"{line} --calibration more.txt")
    assert found.code != 0
    assert "stands for itself" in found.err
    assert not (tmp_path / "out").exists()
