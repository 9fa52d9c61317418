"""BitFit: biases alone, added where there are none; a small file that belongs to one base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_bases import OPTIONS, artifact_of, base, frozen_of, logits, write_text
from safetensors.torch import load_file

import bitfold
from bitfold.training.adapters import AdapterOptions, train_bitfit, train_qlora


def options(**more: Any) -> AdapterOptions:
    return AdapterOptions(**OPTIONS | {"steps": 10, "bias_rate": 3e-2, "rank": 4} | more)


def test_biases_alone_are_trained_and_added_where_there_are_none(tmp_path: Path) -> None:
    artifact = artifact_of(base(tmp_path))
    text = write_text(tmp_path / "text.txt")
    result = train_bitfit(artifact, text, tmp_path / "out", options=options(), evaluation=text)
    assert result.perplexity_after is not None
    assert result.perplexity_before is not None
    assert result.perplexity_after < 0.5 * result.perplexity_before
    # Outputs of the 7 layers of both blocks.
    count = 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert result.trained == count
    deltas = load_file(tmp_path / "out" / "biases.safetensors")
    assert sum(delta.numel() for delta in deltas.values()) == count
    assert {delta.dtype for delta in deltas.values()} == {torch.float32}
    assert len(deltas) == 14
    assert result.size_bytes < 4 * count + 4000

    dense = bitfold.load(artifact)
    for name, delta in deltas.items():
        layer = dense.get_submodule(name.removesuffix(".bias"))
        layer.bias = torch.nn.Parameter(delta)
    found = logits(bitfold.load(tmp_path / "out"))
    assert torch.allclose(found, logits(dense), atol=1e-4)
    for name, layer in frozen_of(bitfold.load(tmp_path / "out")).items():
        assert torch.equal(layer.dequantize(torch.float32), dense.get_submodule(name).weight.data)


def test_biases_that_are_there_are_changed_by_what_is_written(tmp_path: Path) -> None:
    """OPT has biases everywhere, in norms too."""
    original = base(tmp_path, "opt")
    text = write_text(tmp_path / "text.txt")
    asked = options(scheme="w16a16")
    result = train_bitfit(original, text, tmp_path / "out", options=asked)
    before, after = bitfold.load(original), bitfold.load(tmp_path / "out")
    deltas = load_file(tmp_path / "out" / "biases.safetensors")
    names = [name for name, _ in before.named_parameters() if name.endswith(".bias")]
    assert sorted(deltas) == sorted(names)
    assert any("layer_norm" in name for name in names)
    trained = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        change = deltas.get(name, torch.zeros(()))
        assert torch.allclose(trained[name], parameter + change, atol=1e-6), name
    assert result.trained == sum(deltas[name].numel() for name in names)
    total = sum(parameter.numel() for parameter in before.parameters())
    assert result.share == pytest.approx(result.trained / total)


def test_both_together(tmp_path: Path) -> None:
    artifact, text = artifact_of(base(tmp_path)), write_text(tmp_path / "text.txt")
    alone = train_qlora(artifact, text, tmp_path / "lora", options=options(rate=3e-3))
    both = train_qlora(artifact, text, tmp_path / "both", options=options(rate=3e-3, bitfit=True))
    assert both.kinds == ("lora", "bitfit")
    assert both.trained == alone.trained + 2 * (64 + 32 + 32 + 64 + 96 + 96 + 64)
    assert both.held_back_after is not None
    model = bitfold.load(tmp_path / "both")
    loss = bitfold.evaluate(
        model, text, tokenizer=bitfold.load_tokenizer(artifact), sequence_length=12
    )
    assert loss.texts["text"].perplexity is not None
    assert all(layer.bias is not None for layer in frozen_of(model).values())
    deltas = load_file(tmp_path / "both" / "biases.safetensors")
    assert all(float(delta.abs().max()) > 0 for delta in deltas.values())


def test_biases_of_another_base_are_refused(tmp_path: Path) -> None:
    artifact, text = artifact_of(base(tmp_path)), write_text(tmp_path / "text.txt")
    train_bitfit(artifact, text, tmp_path / "out", options=options(steps=1))
    mark = tmp_path / "out" / "bitfold_adapter.json"
    content = json.loads(mark.read_text())
    content["base"] = str(base(tmp_path / "other", "opt"))
    mark.write_text(json.dumps(content))
    with pytest.raises(bitfold.BitfoldError, match="not the one that it was trained on"):
        bitfold.load(tmp_path / "out")
