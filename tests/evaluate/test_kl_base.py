"""llama.cpp's file of log-probabilities: its layout by an independent reader, and what is measured with it.

`llama_cpp.kld` is the real program's: llama-perplexity of llama-cpp-python 0.3.36's sources, on the embedded model as a
float32 GGUF, with `-f TEXT -c 8 -b 8 --chunks 2 -ctk f32 -ctv f32 -fa off --kl-divergence-base FILE`, TEXT being the
first 3000 bytes of the embedded evaluation text.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitfold
from bitfold.assets import DEMO_MODEL, EVALUATION_TEXT
from bitfold.errors import DataError, OutputError
from bitfold.evaluate import evaluate, evaluate_kl_base, write_kl_base
from bitfold.evaluate.logits_file import decode_rows, encode_rows, read_logits_file
from bitfold.runtime.load import load, load_tokenizer

LLAMA_CPP = Path(__file__).with_name("llama_cpp.kld")
LENGTH = 32
HALF_STEP = 16 / 65535 / 2
"""No log-probability in a file is further from the model's, so no mean of their differences is."""


@pytest.fixture(scope="module")
def model():
    return load(DEMO_MODEL, device="cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(EVALUATION_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory, model, tokenizer, text) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.kld"
    options: dict[str, Any] = {"tokenizer": tokenizer, "sequence_length": LENGTH, "windows": 9}
    write_kl_base(model, text, path, **options)
    return path


def tiny(vocab_size: int = 4096, positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def read_by_hand(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, L] and log-probabilities [n, T, V] by struct alone."""
    content = path.read_bytes()
    assert content[:8] == b"_logits_"
    length, vocab_size, count = struct.unpack_from("<iii", content, 8)
    place = 20
    tokens = np.array(struct.unpack_from(f"<{length * count}i", content, place))
    place += 4 * length * count
    padded = vocab_size + vocab_size % 2
    rows = []
    for _ in range(count * (length - 1 - length // 2)):
        scale, low = struct.unpack_from("<ff", content, place)
        codes = struct.unpack_from(f"<{vocab_size}H", content, place + 8)
        rows.append(scale * np.array(codes, dtype=np.float64) + low)
        place += 8 + 2 * padded
    assert place == len(content)
    return tokens.reshape(count, length), np.array(rows).reshape(count, -1, vocab_size)


def log_probabilities(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Of positions L//2 … L−2, one window at a time, float64."""
    half = tokens.shape[1] // 2
    with torch.no_grad():
        rows = [model(torch.tensor(row[None])).logits[0, half:-1].double() for row in tokens]
    return torch.stack(rows).log_softmax(-1).numpy()


# --- the layout ---


def test_what_is_written_by_an_independent_reader(base, model, tokenizer, text):
    tokens, found = read_by_hand(base)
    ids = tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    assert tokens.flatten().tolist() == ids[: 9 * LENGTH]
    expected = log_probabilities(model, tokens)
    deep = expected.max(-1, keepdims=True) - 16
    resolution = 16 / 65535
    assert np.abs(found - np.maximum(expected, deep)).max() < resolution
    assert (expected > deep).mean() > 0.9  # most of it is above the bottom


@pytest.mark.parametrize("vocab_size", [1, 6, 7])
def test_rows_come_back_within_half_a_step(vocab_size):
    """Of odd vocabularies too, whose rows are padded."""
    logits = 4 * torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(0))
    rows = encode_rows(logits)
    assert rows.dtype == np.dtype("<u2")
    assert rows.shape == (50, 4 + vocab_size + vocab_size % 2)
    expected = (
        logits.double()
        .log_softmax(-1)
        .maximum((logits.amax(-1) - logits.double().logsumexp(-1))[:, None] - 16)
    )
    step = (logits.amax(-1) - logits.amin(-1)).clamp(max=16) / 65535
    assert ((decode_rows(rows, vocab_size) - expected).abs() <= 0.51 * step[:, None] + 2e-6).all()


def test_rows_of_masked_and_of_equal_logits():
    masked = encode_rows(torch.tensor([[0.0, -torch.inf, 1.0], [2.0, 2.0, 2.0]]))
    found = decode_rows(masked, 3)
    assert found[0, 1] == pytest.approx(-16 - np.log(1 + np.exp(-1)), abs=1e-4)
    assert found[1].tolist() == pytest.approx([-np.log(3)] * 3)
    for broken in (torch.nan, torch.inf):
        with pytest.raises(DataError, match="not all finite"):
            encode_rows(torch.tensor([[0.0, broken]]))


# --- llama.cpp's own file ---


def test_llama_cpps_file_is_what_is_written_here(model, tokenizer, text, tmp_path):
    tokens, theirs = read_by_hand(LLAMA_CPP)
    write_kl_base(
        model, text, tmp_path / "own.kld", tokenizer=tokenizer, sequence_length=8, windows=2
    )
    own_tokens, own = read_by_hand(tmp_path / "own.kld")
    assert (tokens == own_tokens).all()
    assert np.abs(theirs - own).max() < 1e-3
    assert (tmp_path / "own.kld").stat().st_size == LLAMA_CPP.stat().st_size


def test_llama_cpps_file_is_read(model, tokenizer):
    found = evaluate_kl_base(model, LLAMA_CPP, tokenizer=tokenizer)
    assert abs(found.figures.kl_mean) < HALF_STEP
    assert found.figures.top1_agreement == 1
    # What llama.cpp printed of it: PPL = 4256.2809.
    assert found.base_perplexity == pytest.approx(4256.2809, rel=1e-3)
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-3)


# --- what is measured ---


def test_a_model_is_at_no_distance_from_itself(base, model, tokenizer):
    steps: list[tuple[int, int]] = []
    found = evaluate_kl_base(
        model, base, tokenizer=tokenizer, progress=lambda *step: steps.append(step)
    )
    content = found.to_json()
    assert abs(content["kl_mean"]) < HALF_STEP
    assert content["top1_agreement"] == 1
    assert content["perplexity_ratio"] == pytest.approx(1, abs=1e-5)
    assert content["tokens"] == 9 * (LENGTH - 1 - LENGTH // 2)
    assert (content["windows"], content["sequence_length"]) == (9, LENGTH)
    assert steps[-1] == (9, 9)
    json.dumps(content, allow_nan=False)


def test_figures_equal_an_independent_reference(base, tokenizer):
    """As llama.cpp has them: nothing normalized again, what is not above −16 left out."""
    tokens, p = read_by_hand(base)
    model = tiny()
    q = log_probabilities(model, tokens)
    came = tokens[:, LENGTH // 2 + 1 :, None]
    kl = np.where(p > -16, np.exp(p) * (p - q), 0).sum(-1)
    nll, base_nll = (-np.take_along_axis(x, came, -1)[..., 0] for x in (q, p))
    agree = (p.argmax(-1) == q.argmax(-1)).astype(float)

    def error(values: np.ndarray) -> float:
        return float(values.mean(1).std(ddof=1) / np.sqrt(len(values)))

    ratio = np.exp((nll - base_nll).mean())
    expected = {
        "perplexity": np.exp(nll.mean()),
        "base_perplexity": np.exp(base_nll.mean()),
        "perplexity_ratio": ratio,
        "perplexity_ratio_se": ratio * error(nll - base_nll),
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_se": error(kl),
        "top1_agreement": agree.mean(),
    }
    found = evaluate_kl_base(model, base, tokenizer=tokenizer).to_json()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert kl.mean() > 1


def test_a_quantized_models_kl_is_that_of_evaluate(base, model, tokenizer, text, tmp_path):
    """`evaluate` takes all positions, so it is asked of the second halves by hand."""
    out = tmp_path / "w4"
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme="w4a16g128")
    quantized = load(out, device="cpu")
    tokens, _ = read_by_hand(base)
    p, q = (log_probabilities(one, tokens) for one in (model, quantized))
    kl = (np.exp(p) * (p - q)).sum(-1)

    found = evaluate_kl_base(out, base, device="cpu").figures
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert found.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    whole = evaluate(
        out, text, against=model, sequence_length=LENGTH, windows=9, device="cpu"
    ).texts["some"]
    assert found.kl_mean == pytest.approx(whole.kl_mean, rel=0.3)


def test_the_first_windows_only(base, model, tokenizer):
    found = evaluate_kl_base(model, base, tokenizer=tokenizer, windows=2)
    assert found.figures.windows == 2
    tokens, p = read_by_hand(base)
    came = tokens[:2, LENGTH // 2 + 1 :, None]
    expected = np.exp(-np.take_along_axis(p[:2], came, -1).mean())
    assert found.base_perplexity == pytest.approx(expected, rel=1e-5)


def test_windows_begin_with_a_bos_where_the_tokenizer_has_one(base, model, text, tmp_path):
    """In the file stand the text's own tokens, the models see the BOS in place of each window's first."""
    copy = tmp_path / "bos"
    shutil.copytree(DEMO_MODEL, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    mark = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"]["single"].insert(0, mark)
    content["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    }
    (copy / "tokenizer.json").write_text(json.dumps(content))
    path = tmp_path / "bos.kld"
    write_kl_base(copy, text, path, sequence_length=LENGTH, windows=3, device="cpu")
    tokens, found = read_by_hand(path)
    plain, _ = read_by_hand(base)
    assert tokens.flatten().tolist() == [0, *plain.flatten()[: 3 * LENGTH - 1].tolist()]
    seen = tokens.copy()
    seen[:, 0] = 0
    expected = log_probabilities(model, seen)
    deep = expected.max(-1, keepdims=True) - 16
    assert np.abs(found - np.maximum(expected, deep)).max() < 16 / 65535
    assert abs(evaluate_kl_base(copy, path, device="cpu").figures.kl_mean) < HALF_STEP
    without = evaluate_kl_base(model, path, tokenizer=load_tokenizer(DEMO_MODEL)).figures
    assert without.kl_mean > 10 * HALF_STEP


def test_a_broken_model_is_counted(base, tokenizer):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    found = evaluate_kl_base(model, base, tokenizer=tokenizer).to_json()
    assert found["kl_mean"] is found["perplexity"] is found["perplexity_ratio"] is None
    assert found["nonfinite_tokens"] == found["tokens"]
    json.dumps(found, allow_nan=False)


def test_a_broken_row_of_the_file_is_counted(base, model, tokenizer, tmp_path):
    """As a program writes it whose model broke on one token."""
    content = bytearray(base.read_bytes())
    place = 20 + 4 * 9 * LENGTH
    content[place : place + 4] = struct.pack("<f", float("nan"))
    path = tmp_path / "broken.kld"
    path.write_bytes(content)
    found = evaluate_kl_base(model, path, tokenizer=tokenizer).to_json()
    assert found["kl_mean"] is found["base_perplexity"] is found["perplexity_ratio"] is None
    assert found["nonfinite_tokens"] == 1
    assert found["perplexity"] > 1


# --- what cannot be ---


def test_files_that_cannot_be_read(base, model, tokenizer, tmp_path):
    content = base.read_bytes()

    def fails(words: str, changed: bytes) -> None:
        path = tmp_path / "changed.kld"
        path.write_bytes(changed)
        with pytest.raises(DataError, match=words):
            evaluate_kl_base(model, path, tokenizer=tokenizer)

    for size in (10, 19, 30, len(content) - 1):
        fails("is truncated", content[:size])
    fails(r"no file of llama-perplexity", b"GGUF" + content[4:])
    fails(r"no file of llama-perplexity", b"")
    fails("but its header promises", content + b"\0")
    fails("which cannot be", content[:8] + struct.pack("<iii", 2, 4096, 9) + content[20:])
    fails("which cannot be", content[:8] + struct.pack("<iii", LENGTH, -1, 9) + content[20:])
    fails("outside its own vocabulary", content[:20] + struct.pack("<i", 4096) + content[24:])
    with pytest.raises(DataError, match="There is no file"):
        read_logits_file(tmp_path / "absent.kld")
    with pytest.raises(DataError, match="is a directory"):
        read_logits_file(tmp_path)


def test_models_that_cannot_be_compared(base, tokenizer):
    with pytest.raises(DataError, match="logits of 4096 tokens and the model a vocabulary of 4097"):
        evaluate_kl_base(tiny(4097), base, tokenizer=tokenizer)
    with pytest.raises(DataError, match="windows of 32 tokens, which are beyond the 16 positions"):
        evaluate_kl_base(tiny(positions=16), base, tokenizer=tokenizer)
    with pytest.raises(DataError, match="windows must be at least 1"):
        evaluate_kl_base(tiny(), base, tokenizer=tokenizer, windows=0)
    with pytest.raises(DataError, match="pass tokenizer="):
        evaluate_kl_base(tiny(), base)


def test_nothing_half_written_is_left(model, tokenizer, text, tmp_path):
    path = tmp_path / "out.kld"

    def fails(words: str, error: type[Exception], one: Any, place: Path, **options: Any) -> None:
        with pytest.raises(error, match=words):
            write_kl_base(one, text, place, **{"tokenizer": tokenizer, **options})
        assert not list(tmp_path.glob("*.kld")) + list(tmp_path.glob(".*"))

    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    fails("not all finite", DataError, broken, path, sequence_length=LENGTH)
    fails("There is no directory", OutputError, model, tmp_path / "absent" / "out.kld")
    fails("no second half", DataError, model, path, sequence_length=2)
    fails("more than the 512 positions", DataError, model, path, sequence_length=513)
    fails("windows must be at least 1", DataError, model, path, windows=0)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_kl_base(model, text, path, tokenizer=tokenizer, sequence_length=LENGTH, progress=stop)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="is there already"):
        write_kl_base(model, text, path, tokenizer=tokenizer)
    assert path.read_bytes() == b"mine"
