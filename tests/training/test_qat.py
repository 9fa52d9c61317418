"""A language model is trained through its rounding, and what comes out is an artifact like any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bitfold
from bitfold.errors import CheckpointError, DataError, OutputError, RecipeError
from bitfold.export.reading import read_model
from bitfold.numerics import QuantizedTensor
from bitfold.training import loop as loop_file
from bitfold.training.beginning import with_written
from bitfold.training.qat import QatOptions, TrainedModel, train_qat
from bitfold.training.text import held_back, text_windows

OPTIONS = QatOptions(
    scheme="w2a16g16",
    start="rtn",
    written=0,
    steps=12,
    batch=4,
    rate=5e-4,
    sequence_length=32,
    hold_back=0.1,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "train.txt"
    lines = [f"Line {n}: the quick brown fox of {n * 7 % 13} jumps.\n" for n in range(120)]
    file.write_text("".join(lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def original() -> Path:
    return Path(bitfold.__file__).parent / "assets" / "tiny-llama"


@pytest.fixture(scope="module")
def trained(original: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    out = tmp_path_factory.mktemp("qat") / "w2"
    return train_qat(original, text, out, options=OPTIONS, teacher=original, evaluation=text)


def test_training_lowers_the_distance_and_the_artifact_says_so(
    trained: TrainedModel, original: Path
) -> None:
    assert trained.held_back_before is not None
    assert trained.held_back_after is not None
    assert trained.held_back_after < 0.9 * trained.held_back_before
    assert trained.kl is not None
    assert trained.kl < trained.held_back_before
    out = trained.artifact.out
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "lsq"
    assert "Trained through rounding" in report["notes"][-1]
    bitfold.verify(out)
    stored = read_model(out)
    assert len(stored.schemes) == 42
    assert all(s.weight is not None and s.weight.bits == 2 for s in stored.schemes.values())
    assert not out.with_name(f".{out.name}.training").exists()
    # Norms are trained, embeddings stay.
    before, after = bitfold.load(original), bitfold.load(out)
    name = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(before.get_parameter(embeddings), after.get_parameter(embeddings))


def test_a_killed_run_goes_on_to_the_same_artifact(
    trained: TrainedModel,
    original: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_file, "_SAVE_SECONDS", 0.0)

    def kill(done: float, total: int, what: str) -> None:
        if total == OPTIONS.steps and done == 7:
            raise KeyboardInterrupt

    out = tmp_path / "w2"
    with pytest.raises(KeyboardInterrupt):
        train_qat(original, text, out, options=OPTIONS, teacher=original, progress=kill)
    assert not out.exists()
    again = train_qat(original, text, out, options=OPTIONS, teacher=original)
    assert 0 < again.resumed <= 7
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files
    for name in files:
        assert (out / name).read_bytes() == (trained.artifact.out / name).read_bytes()


def test_it_begins_with_the_codes_of_ptq(original: Path, text: Path, tmp_path: Path) -> None:
    """Not a step better than that: the artifact is that of the method it begins with."""
    options = replace(OPTIONS, start="gptq", steps=1, rate=1e-12)
    found = train_qat(original, text, tmp_path / "trained", options=options, teacher=original)
    rows = held_back(text_windows(text, bitfold.load_tokenizer(original), 32, 8192), 0.1, 0)[0]
    np.save(tmp_path / "rows.npy", rows[:128].numpy())
    bitfold.quantize(
        original,
        tmp_path / "ptq",
        method="gptq",
        scheme=options.scheme,
        calibration=tmp_path / "rows.npy",
        samples=len(rows[:128]),
        sequence_length=32,
    )
    one, other = read_model(found.artifact.out), read_model(tmp_path / "ptq")
    for name in one.schemes:
        mine, wanted = one.read(f"{name}.weight"), other.read(f"{name}.weight")
        assert isinstance(mine, QuantizedTensor)
        assert isinstance(wanted, QuantizedTensor)
        assert torch.equal(mine.codes, wanted.codes)
        assert torch.equal(mine.scale, wanted.scale)
        assert mine.zero is not None
        assert wanted.zero is not None
        assert torch.equal(mine.zero, wanted.zero)


def test_a_start_that_changes_more_than_it_rounds_is_refused(
    original: Path, text: Path, tmp_path: Path
) -> None:
    options = replace(OPTIONS, start="awq")
    with pytest.raises(RecipeError, match="choose a --start that only rounds"):
        train_qat(original, text, tmp_path / "out", options=options)
    with pytest.raises(RecipeError, match=r"_proj.weight shows: choose a --start"):
        train_qat(original, text, tmp_path / "out", options=replace(OPTIONS, start="vq"))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="gptk"):
        train_qat(original, text, tmp_path / "out", options=replace(OPTIONS, start="gptk"))


def test_windows_that_the_teacher_writes_are_half(original: Path) -> None:
    teacher, rows = bitfold.load(original), torch.zeros(7, 16, dtype=torch.long)
    mixed = with_written(rows, teacher, 3, 0, None)
    assert torch.equal(mixed[:7], rows)
    assert len(mixed) == 7 + 9
    assert len(mixed[7:].unique(dim=0)) == 3
    assert torch.equal(mixed, with_written(rows, teacher, 3, 0, None))


@pytest.mark.parametrize("method", ["ternary", "twn", "qat"])
def test_other_methods(method: str, original: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, method=method, steps=2)
    found = train_qat(original, text, tmp_path / "out", options=options)
    stored = read_model(found.artifact.out)
    weight = stored.read(f"{next(iter(stored.schemes))}.weight")
    assert isinstance(weight, QuantizedTensor)
    codes = weight.codes
    lowest = -1 if method != "qat" else -2
    assert int(codes.min()) == lowest
    assert int(codes.max()) == 1
    assert found.kl is None


def test_quantized_inputs_are_trained_through_as_they_run(
    original: Path, text: Path, tmp_path: Path
) -> None:
    options = replace(OPTIONS, scheme="w4a4", steps=2)
    found = train_qat(original, text, tmp_path / "out", options=options, teacher=original)
    activation = next(iter(read_model(found.artifact.out).schemes.values())).activation
    assert activation is not None
    assert activation.bits == 4


def test_what_cannot_be_is_one_sentence(
    trained: TrainedModel, original: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="add --overwrite"):
        train_qat(original, text, trained.artifact.out, options=OPTIONS)
    with pytest.raises(CheckpointError, match="quantized already"):
        train_qat(trained.artifact.out, text, tmp_path / "out", options=OPTIONS)
    with pytest.raises(RecipeError, match="steps must be at least 1"):
        QatOptions(steps=0)
    with pytest.raises(RecipeError, match="does not train language models"):
        QatOptions(method="bnn")
    with pytest.raises(RecipeError, match="leaves weights alone"):
        train_qat(original, text, tmp_path / "out", options=replace(OPTIONS, scheme="w16a8"))
    with pytest.raises(RecipeError, match="are not trained"):
        train_qat(original, text, tmp_path / "out", options=replace(OPTIONS, scheme="w4a4kv4"))
    with pytest.raises(RecipeError, match=r"Group size 48 does not divide"):
        train_qat(original, text, tmp_path / "out", options=replace(OPTIONS, scheme="w2a16g48"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(DataError, match="empty"):
        train_qat(original, empty, tmp_path / "out", options=OPTIONS)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
