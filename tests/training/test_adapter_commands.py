"""`bitfold train qlora|bitfit|merge`, and the commands that take what they make."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_bases import artifact_of, base, write_text

from bitfold.cli import main

Run = Callable[[str], tuple[int, str, str]]
SHORT = "--steps 4 --batch 2 --sequence-length 12"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitfold", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def test_from_training_to_merging(run: Run, tmp_path: Path) -> None:
    artifact = artifact_of(base(tmp_path))
    text = write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    given = f"{artifact} --text {text} --evaluate {text} -o {out} {SHORT}"
    code, said, err = run(f"train qlora {given} --rank 2 --bitfit --json")
    assert code == 0, err
    result = json.loads(said)
    assert result["kinds"] == ["lora", "bitfit"]
    assert "training 100%" in err or "training 0%" in err
    code, said, _ = run(f"eval {out} --text {text} --sequence-length 12 --json")
    assert json.loads(said)["perplexity"] == pytest.approx(result["perplexity_after"], rel=1e-4)
    code, said, _ = run(f"generate {out} --prompt 'w1 w2' --max-new-tokens 3")
    assert code == 0
    code, said, _ = run(f"inspect {out}")
    assert "rank 2" in said
    assert f"{result['trained']:,}" in said
    code, said, err = run(f"train merge {out} -o {tmp_path / 'merged'}")
    assert code == 0, err
    assert "left their grid" in said


def test_bitfit_says_the_share(run: Run, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    line = f"{base(tmp_path)} --scheme wnf4a16g32 --text {text} -o {tmp_path / 'out'} {SHORT}"
    code, said, err = run(f"train bitfit {line}")
    assert code == 0, err
    assert "% of the model's" in said
    assert "held-back" in said
    code, _, err = run(f"train bitfit {line}")
    assert code == 1
    assert "--overwrite" in err
    assert run(f"train bitfit {line} --overwrite")[0] == 0


def test_one_sentence_for_what_is_wrong(run: Run, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    original = base(tmp_path)
    code, out, _ = run(
        f"train qlora {original} --text {tmp_path / 'no.txt'} -o {tmp_path / 'o'} --json"
    )
    assert code == 1
    assert json.loads(out)["kind"] == "DataError"
    code, _, err = run(f"train qlora {original} --text {text} -o {tmp_path / 'o'} --rank 0")
    assert code == 1
    assert "rank of 0" in err
    code, _, err = run(f"train qlora {original} -o {tmp_path / 'o'}")
    assert code == 2
    assert "--text" in err
