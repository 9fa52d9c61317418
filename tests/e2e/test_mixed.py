"""Mixed precision on the command line, on the embedded model."""

from pathlib import Path

import pytest
import yaml
from commands import Run

import bitfold
from bitfold.assets import DEMO_MODEL

ONE = "--sensitivity-windows 1 --candidates 4,3,2"
QUICK = f"{ONE} --sequence-length 64"


def test_ranking(run: Run) -> None:
    done = run(f"quantize {DEMO_MODEL} --sensitivity --sensitivity-windows 1 --candidates 4,2")
    assert done.code == 0, done.err
    for word in ("model.layers.0: q_proj, k_proj, v_proj", "2g128", "ranked by 4g128", "1 windows"):
        assert word in done.out
    assert "sensitivity of block 5 of 6" in done.err


def test_ranking_in_json(run: Run) -> None:
    content = run(f"quantize {DEMO_MODEL} --sensitivity {ONE} --per kind --json").json
    assert sorted(group["name"] for group in content["groups"]) == [
        *("down_proj", "gate_proj, up_proj", "o_proj", "q_proj, k_proj, v_proj")
    ]
    for group in content["groups"]:
        assert len(group["layers"]) % 6 == 0
        assert 0 < group["kl"]["4g128"] < group["kl"]["3g128"] < group["kl"]["2g128"]
    assert content["calibration"]["windows"] == 1
    assert content["seconds"] > 0


def test_bits(run: Run, tmp_path: Path) -> None:
    """As many bits as one scheme for all has, and what the command says of them."""
    uniform = run(
        f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/uniform --scheme w3a16g128 --json"
    ).json
    line = f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out --bits {uniform['bits_per_weight']} {QUICK}"
    done = run(line)
    assert done.code == 0, done.err
    for word in ("w3a16g128 (mixed) by rtn", "mixed precision: what less costs", "chosen"):
        assert word in done.out
    assert "quantizing 0%: sensitivity of block 1 of 6" in done.err
    assert "quantizing 0%: block 1 of 6" in done.err
    made = run(f"{line} --json").json
    assert made["finished_before"]
    assert made["bits_per_weight"] <= uniform["bits_per_weight"]
    assert len({layer["scheme"] for layer in made["layers"]}) > 1
    assert made["format"] == "compressed-tensors"
    shown = run(f"inspect {tmp_path}/out --json").json
    assert shown["allocation"] == made["allocation"]
    assert yaml.safe_load(shown["recipe"])["layers"]
    assert "(mixed)" in (tmp_path / "out" / "README.md").read_text()


def test_fit(run: Run, tmp_path: Path) -> None:
    line = f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out --fit 4.6MB {QUICK} --json"
    made = run(line).json
    assert made["size_bytes"] <= 4_600_000
    assert sum(f.stat().st_size for f in (tmp_path / "out").iterdir()) == made["size_bytes"]
    assert run(f"verify {tmp_path}/out").code == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    bitfold.load(tmp_path / "out")


REFUSED = {
    "nowhere to put it": ("--bits 3", 2, "Missing option '-o' / '--out'"),
    "a result of measuring": ("--sensitivity -o out --bits 3", 2, "leave --bits and --out out"),
    "a result that is not made": (
        "--sensitivity --dry-run --overwrite --no-resume",
        2,
        "only measures: leave --overwrite, --no-resume and --dry-run out",
    ),
    "latencies": ("--sensitivity --latency-table t.json", 2, "leave --latency-table out"),
    "a calibration of another size": (
        "--sensitivity --samples 128 --sequence-length 64",
        2,
        "as many as --sensitivity-windows says: leave --samples and --sequence-length out",
    ),
    "no budget": ("-o out --per kind", 1, "give --bits, --fit or --latency"),
    "no size": ("-o out --fit small", 1, "write for example 3.5GB or 512MiB"),
    "no numbers": ("-o out --bits 3 --candidates few", 1, "--candidates takes whole numbers"),
    "neither layer nor kind": ("-o out --bits 3 --per block", 1, "per layer or per kind"),
    "too few bits": ("-o out --bits 1.5 --sensitivity-windows 1 --candidates 2", 1, "is 2.1406"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(run: Run, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, code, sentence = REFUSED[case]
    done = run(f"quantize {DEMO_MODEL} --method rtn {options} --json")
    assert done.code == code
    assert sentence in done.json["error"]
    assert not (tmp_path / "out").exists()
