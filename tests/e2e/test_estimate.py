"""What --dry-run says against what the run takes."""

import time
from pathlib import Path

import pytest
import torch
from commands import Run

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.pipeline.estimate import Estimate
from models_zoo import Zoo

SCHEMES = {
    "packed": ("w4a16g128", ()),
    "symmetric": ("w3a16g32", ("weight.symmetric=true",)),
    "blocks of a row": ("w4a8kv4g64", ()),
    "a byte a weight": ("w8a8", ("activation.static=true",)),
    "fp8": ("wfp8afp8", ()),
    "bitfold's own": ("wnf4a16g64", ()),
    "mxfp4": ("wmxfp4amxfp4", ()),
    "nvfp4": ("wnvfp4anvfp4", ()),
}
AWQ = {"method": "awq", "samples": 12, "sequence_length": 64}


@pytest.mark.parametrize("case", SCHEMES)
def test_bytes(tmp_path: Path, case: str) -> None:
    scheme, set = SCHEMES[case]
    options = {"method": "rtn", "scheme": scheme, "set": set, "samples": 2}
    options["sequence_length"] = 64
    said = bitfold.quantize(DEMO_MODEL, tmp_path / "out", dry_run=True, **options)
    made = bitfold.quantize(DEMO_MODEL, tmp_path / "out", **options)
    assert isinstance(said, Estimate)
    assert isinstance(made, bitfold.Quantization)
    assert said.format == made.format
    assert said.size_bytes == pytest.approx(made.size_bytes, rel=0.05)
    assert said.disk_bytes > said.size_bytes


def test_bytes_of_a_quantized_head(checkpoint: Zoo, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("scheme: w4a16g32\nlayers: [{match: lm_head, scheme: w8a16}]\n")
    model = checkpoint("llama", torch.float32)
    said = bitfold.quantize(model, tmp_path / "out", recipe=file, dry_run=True)
    made = bitfold.quantize(model, tmp_path / "out", recipe=file)
    assert isinstance(said, Estimate)
    assert isinstance(made, bitfold.Quantization)
    assert said.size_bytes == pytest.approx(made.size_bytes, rel=0.05)


@pytest.mark.parametrize("options", [{"method": "rtn"}, AWQ], ids=["rtn", "awq"])
def test_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """Of the order of what it takes, on the clock of this process: how near it comes is measured, not tested."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    bitfold.quantize(
        DEMO_MODEL, tmp_path / "first", **(options | {"samples": 1})
    )  # pays for imports
    said = bitfold.quantize(DEMO_MODEL, tmp_path / "out", dry_run=True, **options)
    made = bitfold.quantize(DEMO_MODEL, tmp_path / "out", **options)
    assert isinstance(said, Estimate)
    assert isinstance(made, bitfold.Quantization)
    assert 0.1 < said.seconds / made.seconds < 10


def test_memory(run_process: Run, tmp_path: Path) -> None:
    """Of processes of their own: a peak never sinks again."""
    line = f"quantize {DEMO_MODEL} -o {tmp_path}/out --method awq --samples 12 --sequence-length 64 --json"
    said = run_process(f"{line} --dry-run").json["peak_rss_mb"]
    made = run_process(line).json["peak_rss_mb"]
    assert 0.8 < said / made < 1.25
