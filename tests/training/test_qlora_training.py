"""QLoRA from a text to an adapter, and everything that takes the adapter."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_bases import OPTIONS, artifact_of, base, frozen_of, logits, write_text
from safetensors.torch import load_file, save_file

import bitfold
from bitfold.errors import (
    CheckpointError,
    DataError,
    ExportError,
    MissingExtraError,
    OutputError,
    RecipeError,
)
from bitfold.runtime.adapted import MARK
from bitfold.training.adapters import (
    AdapterOptions,
    merge_adapter,
    train_bitfit,
    train_qlora,
)

LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def options(**more: Any) -> AdapterOptions:
    return AdapterOptions(**OPTIONS | {"steps": 10, "rank": 4, "rate": 1e-2} | more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, an artifact, texts, adapters `lora` and `both` on the artifact; not to be changed."""
    place = tmp_path_factory.mktemp("made")
    original = base(place)
    artifact_of(original).rename(place / "artifact")
    write_text(place / "text.txt")
    write_text(place / "test.txt", 100, seed=1)
    result = train_qlora(
        place / "artifact",
        place / "text.txt",
        place / "lora",
        options=options(),
        evaluation=place / "test.txt",
    )
    (place / "result.json").write_text(json.dumps(result.to_json()))
    both = options(bitfit=True, bias_rate=1e-2)
    train_qlora(place / "artifact", place / "text.txt", place / "both", options=both)
    return place


def effect(adapter: Path, layer: str) -> torch.Tensor:
    """alpha/rank · BA in float64, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{x}.weight"].double() for x in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


def test_it_learns_the_text_and_says_what_it_took(made: Path) -> None:
    result = json.loads((made / "result.json").read_text())
    assert result["perplexity_after"] < 0.5 * result["perplexity_before"]
    assert result["held_back_after"] < result["held_back_before"]
    # rank · (in + out) of each layer; the model has 2 blocks of width 64, 2 of 4 heads for keys, and 96 between.
    of_block = 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert result["trained"] == 2 * of_block
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    others = 2 * 96 * 64 + 5 * 64
    assert result["share"] == pytest.approx(2 * of_block / (weights + others))
    assert result["peak_rss_mb"] > 50
    # 4 bits of code, and of each 32 weights a scale of 16 bits and 4 of a zero-point (in whole words), and shapes
    assert result["base_bytes"] == pytest.approx(weights * (4 + 20 / 32) / 8 + 14 * 16, rel=0.02)


def test_the_adapter_computes_base_plus_product(made: Path) -> None:
    dense = bitfold.load(made / "artifact", dtype="float64")
    for name in frozen_of(bitfold.load(made / "lora")):
        weight = dense.get_submodule(name).weight
        product = effect(made / "lora", name)
        assert float(product.abs().max()) > 1e-3
        weight.data = weight.data + product
    found = logits(bitfold.load(made / "lora"))
    assert torch.allclose(found.double(), logits(dense), atol=1e-3)
    assert not torch.allclose(found, logits(bitfold.load(made / "artifact")), atol=1e-1)


def test_peft_alone_reads_it(made: Path) -> None:
    from peft import PeftModel

    dense = bitfold.load(made / "artifact")
    wrapped = PeftModel.from_pretrained(dense, str(made / "lora")).eval()
    assert torch.allclose(logits(wrapped), logits(bitfold.load(made / "lora")), atol=1e-3)


def test_the_base_is_not_touched(made: Path, tmp_path: Path) -> None:
    before = bitfold.load(made / "artifact")
    model = bitfold.load(made / "lora")
    for name, layer in frozen_of(model).items():
        weight = before.get_submodule(name).weight
        assert torch.allclose(layer.dequantize(torch.float32), weight, atol=1e-6)


def test_evaluate_generate_and_inspect_take_it(made: Path) -> None:
    from bitfold.report.describe import describe

    figures = bitfold.evaluate(made / "lora", made / "test.txt", sequence_length=12).texts["test"]
    result = json.loads((made / "result.json").read_text())
    assert figures.perplexity == pytest.approx(result["perplexity_after"], rel=1e-4)
    written = bitfold.generate(made / "lora", "w1 w2", max_new_tokens=5)
    assert {*written.text.split()} <= {f"w{n}" for n in range(1, 6)}
    content = describe(made / "lora")
    assert content["kind"] == "adapter"
    assert content["adapter"]["rank"] == 4
    assert content["adapter"]["figures"]["trained"] == result["trained"]


def test_targets_and_bad_ones(made: Path, tmp_path: Path) -> None:
    chosen = options(targets=("q_proj", "v_proj"), steps=1)
    result = train_qlora(made / "artifact", made / "text.txt", tmp_path / "out", options=chosen)
    assert result.trained == 2 * 4 * (128 + 96)
    bad = options(targets=("query",))
    with pytest.raises(DataError, match=r"no linear layer 'query'.*q_proj"):
        train_qlora(made / "artifact", made / "text.txt", tmp_path / "bad", options=bad)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kind", ["lora", "both"])
def test_a_killed_run_gives_the_same_bytes(made: Path, tmp_path: Path, kind: str) -> None:
    asked = options(bitfit=True, bias_rate=1e-2) if kind == "both" else options()

    def kill(done: float, total: int, doing: str) -> None:
        if done == 7:
            raise KilledError

    out = tmp_path / "out"
    more: dict[str, Any] = {} if kind == "both" else {"evaluation": made / "test.txt"}
    given = (made / "artifact", made / "text.txt", out)
    with pytest.raises(KilledError):
        train_qlora(*given, options=asked, progress=kill, **more)
    assert not out.exists()
    assert train_qlora(*given, options=asked, **more).resumed == 6
    for file in (made / kind).iterdir():
        if file.name not in (MARK, "adapter_config.json"):
            assert file.read_bytes() == (out / file.name).read_bytes(), file.name
    mark, expected = (json.loads((place / MARK).read_text()) for place in (out, made / kind))
    assert mark["figures"] == expected["figures"]


def test_a_fresh_run_where_asked(made: Path, tmp_path: Path) -> None:
    def kill(done: float, total: int, doing: str) -> None:
        if done == 7:
            raise KilledError

    given = (made / "artifact", made / "text.txt", tmp_path / "out")
    with pytest.raises(KilledError):
        train_qlora(*given, options=options(), progress=kill)
    assert train_qlora(*given, options=options(), resume=False).resumed == 0


def test_an_original_in_nf4_is_the_same_when_loaded_again(made: Path, tmp_path: Path) -> None:
    asked = options(scheme="wnf4a16g32", steps=2)
    train_qlora(made / "llama", made / "text.txt", tmp_path / "out", options=asked)
    model = bitfold.load(tmp_path / "out")
    assert {layer.block for layer in frozen_of(model).values()} == {256}
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    expected = logits(bitfold.load(tmp_path / "merged"))
    found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < 0.02  # merged into bfloat16
    said = json.loads((tmp_path / "out" / MARK).read_text())
    assert said["scheme"] == "wnf4a16g32"


def test_a_teacher_is_imitated(made: Path, tmp_path: Path) -> None:
    asked = options(teacher_weight=1.0, steps=30, dropout=0.0, rate=1e-3)
    teacher = made / "llama"
    given = (made / "artifact", made / "text.txt", tmp_path / "out")
    train_qlora(*given, options=asked, teacher=teacher)
    kl = {
        name: bitfold.evaluate(place, made / "text.txt", sequence_length=12, against=teacher)
        .texts["text"]
        .kl_mean
        for name, place in (("before", made / "artifact"), ("after", tmp_path / "out"))
    }
    assert kl["after"] < kl["before"]


# --- merging ---


def test_merged_into_the_base(made: Path, tmp_path: Path) -> None:
    result = merge_adapter(made / "lora", tmp_path / "merged")
    assert "left their grid" in result.notes[0]
    tensors = load_file(next((tmp_path / "merged").glob("*1-of*.safetensors")))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    found, expected = (logits(bitfold.load(p)) for p in (tmp_path / "merged", made / "lora"))
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_merged_into_the_original(made: Path, tmp_path: Path) -> None:
    """Each weight is the original's plus alpha/rank · BA, rounded once."""
    merge_adapter(made / "lora", tmp_path / "merged", into=made / "llama")
    original, merged = bitfold.load(made / "llama"), bitfold.load(tmp_path / "merged")
    for leaf in LEAVES:
        part = "self_attn" if leaf in LEAVES[:4] else "mlp"
        name = f"model.layers.1.{part}.{leaf}"
        exact = original.get_submodule(name).weight.double() + effect(made / "lora", name)
        found = merged.get_submodule(name).weight
        # By float32's sum and not float64's, a few round to the neighbour in bfloat16.
        assert torch.allclose(found.double(), exact, rtol=2**-8, atol=0)
        assert (found == exact.bfloat16().float()).double().mean() > 0.99


def test_merged_biases_have_a_place_in_llama(made: Path, tmp_path: Path) -> None:
    merge_adapter(made / "both", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["attention_bias"]
    assert config["mlp_bias"]
    found, expected = (logits(bitfold.load(p)) for p in (tmp_path / "merged", made / "both"))
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_biases_have_no_place_in_gemma(made: Path, tmp_path: Path) -> None:
    original = base(tmp_path, "gemma")
    asked = options(steps=1, scheme="wnf4a16g32")
    train_bitfit(original, made / "text.txt", tmp_path / "out", options=asked)
    with pytest.raises(ExportError, match="no place for"):
        merge_adapter(tmp_path / "out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_what_does_not_fit(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no layer"):
        merge_adapter(made / "lora", tmp_path / "merged", into=base(tmp_path, "opt"))
    with pytest.raises(CheckpointError, match="takes the original"):
        merge_adapter(made / "lora", tmp_path / "merged", into=made / "artifact")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        merge_adapter(made / "lora", tmp_path / "there")


# --- what can be wrong ---


def test_a_base_that_is_gone_or_another(made: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(made / "artifact", tmp_path / "artifact"))
    train_qlora(artifact, made / "text.txt", tmp_path / "out", options=options(steps=1))
    config = artifact / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(CheckpointError, match="not the one that it was trained on"):
        bitfold.load(tmp_path / "out")
    shutil.rmtree(artifact)
    for take in (bitfold.load, bitfold.load_tokenizer):
        with pytest.raises(CheckpointError, match="which is gone"):
            take(tmp_path / "out")


def damaged(made: Path, place: Path, file: str, content: bytes | None) -> Path:
    copy = Path(shutil.copytree(made / "both", place / "copy"))
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (MARK, None, "did not make"),
        (MARK, b"{}", "another version"),
        (MARK, b'{"version": 1, "kinds": ["x"], "base": "", "base_sum": ""}', "damaged"),
        ("adapter_model.safetensors", None, "lacks adapter_model"),
        ("adapter_model.safetensors", b"x", "damaged"),
        ("biases.safetensors", None, "lacks biases"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "x"}', "does not fit"),
    ],
)
def test_damaged_adapters(
    made: Path, tmp_path: Path, file: str, content: bytes | None, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        bitfold.load(damaged(made, tmp_path, file, content))


def test_weights_of_another_adapter(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made / "both", tmp_path / "copy"))
    tensors = load_file(copy / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({n: t for n, t in tensors.items() if n != name}, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        bitfold.load(copy)
    tensors[name] = torch.full_like(tensors[name], np.nan)
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not finite"):
        bitfold.load(copy)


def test_an_adapter_is_no_base(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is an adapter"):
        train_qlora(made / "lora", made / "text.txt", tmp_path / "out")


def test_texts_that_cannot_be(made: Path, tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("w1 w2 w3")
    for text, said in ((empty, "empty"), (short, "one window needs 12")):
        with pytest.raises(DataError, match=said):
            train_qlora(made / "artifact", text, tmp_path / "out", options=options())
    given = (made / "artifact", made / "text.txt", tmp_path / "out")
    with pytest.raises(DataError, match="empty"):
        train_qlora(*given, options=options(), evaluation=empty)
    with pytest.raises(DataError, match="one window needs 12"):
        train_qlora(*given, options=options(), evaluation=short)
    assert not (tmp_path / ".out.partial").exists()
    assert not (tmp_path / "out").exists()


def test_one_window_is_enough(made: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "one.txt", 12)
    result = train_qlora(made / "artifact", text, tmp_path / "out", options=options(steps=2))
    assert result.held_back_before is None
    assert result.kept == 2


def test_peft_is_missing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match="peft"):
        train_qlora(made / "artifact", made / "text.txt", tmp_path / "out")
    with pytest.raises(MissingExtraError, match="peft"):
        bitfold.load(made / "lora")
    asked = options(steps=1)
    train_bitfit(made / "artifact", made / "text.txt", tmp_path / "out", options=asked)


def test_an_output_that_is_there_or_cannot_be(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made / "lora", tmp_path / "copy"))
    given = (made / "artifact", made / "text.txt")
    with pytest.raises(OutputError, match="--overwrite"):
        train_qlora(*given, copy, options=options(steps=1))
    train_qlora(*given, copy, options=options(steps=1), overwrite=True)
    assert json.loads((copy / MARK).read_text())["figures"]["steps"] == 1
    with pytest.raises(OutputError, match="the base itself"):
        train_qlora(*given, made / "artifact", options=options(steps=1), overwrite=True)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path):
        with pytest.raises(OutputError):
            train_qlora(*given, place, options=options(steps=1), overwrite=True)


def test_a_loss_that_is_not_finite(made: Path, tmp_path: Path) -> None:
    wild = options(rate=1e30, steps=20, warmup=0.0)
    result = train_qlora(made / "artifact", made / "text.txt", tmp_path / "out", options=wild)
    assert "not finite" in result.notes[0]
    assert result.kept == 0
    assert torch.isfinite(logits(bitfold.load(tmp_path / "out"))).all()
    expected = logits(bitfold.load(made / "artifact"))
    assert torch.allclose(logits(bitfold.load(tmp_path / "out")), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"teacher_weight": 2.0}, "teacher_weight"),
        ({"steps": 0}, "steps"),
        ({"bias_rate": -1.0}, "rate"),
    ],
)
def test_options_that_cannot_be(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        options(**bad)
