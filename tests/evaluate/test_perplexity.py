import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from transformers import LlamaConfig, LlamaForCausalLM

from bitfold.assets import DEMO_MODEL, EVALUATION_TEXT
from bitfold.errors import CheckpointError, DataError
from bitfold.evaluate import evaluate, token_statistics
from bitfold.evaluate import perplexity as module
from bitfold.runtime.load import load_tokenizer

VOCAB = 4096  # the demo tokenizer's
LENGTH = 32


def tiny(seed: int, vocab_size: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def noised(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = tiny(0)
    copy.load_state_dict(model.state_dict())
    torch.manual_seed(9)
    with torch.no_grad():
        copy.lm_head.weight += 0.1 * torch.randn_like(copy.lm_head.weight)
    return copy


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(EVALUATION_TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    return path


def reference_logits(model, tokenizer, text) -> tuple[np.ndarray, np.ndarray]:
    """Windows [n, L] and float64 logits [n, L, V], one window at a time."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    n = len(ids) // LENGTH
    rows = np.array(ids[: n * LENGTH]).reshape(n, LENGTH)
    with torch.no_grad():
        logits = [model(torch.tensor(row[None])).logits[0].double().numpy() for row in rows]
    return rows, np.stack(logits)


def reference_nll(rows, logits) -> np.ndarray:
    log_p = log_softmax(logits[:, :-1], axis=-1)
    return -np.take_along_axis(log_p, rows[:, 1:, None], axis=-1)[..., 0]


def clustered_error(values) -> float:
    return values.mean(1).std(ddof=1) / np.sqrt(len(values))


@pytest.mark.parametrize("batch", [1, 3 * LENGTH * VOCAB, 2**30])
@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_figures_equal_an_independent_reference(tokenizer, text, monkeypatch, batch, rows_at_once):
    monkeypatch.setattr(module, "LOGITS_PER_BATCH", batch)
    monkeypatch.setattr(module, "LOGITS_PER_SLICE", rows_at_once * VOCAB)
    original = tiny(0)
    model = noised(original)
    rows, logits = reference_logits(model, tokenizer, text)
    _, original_logits = reference_logits(original, tokenizer, text)
    nll = reference_nll(rows, logits)
    p, q = (np.exp(log_softmax(x[:, :-1], axis=-1)) for x in (original_logits, logits))
    kl = rel_entr(p, q).sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).astype(float)

    figures = evaluate(
        model, text, tokenizer=tokenizer, sequence_length=LENGTH, against=original
    ).to_json()

    assert figures.pop("windows") == len(rows)
    assert figures.pop("tokens") == nll.size
    assert figures.pop("sequence_length") == LENGTH
    assert figures.pop("nonfinite_tokens") == 0
    ppl = np.exp(nll.mean())
    expected = {
        "perplexity": ppl,
        "perplexity_se": ppl * clustered_error(nll),
        "kl_mean": kl.mean(),
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_se": clustered_error(kl),
        "top1_agreement": agree.mean(),
        "top1_se": clustered_error(agree),
    }
    assert figures == pytest.approx(expected, rel=1e-5)
    assert kl.mean() > 0.01


def test_a_model_is_at_no_distance_from_itself(tokenizer, text):
    model = tiny(0)
    figures = evaluate(model, text, tokenizer=tokenizer, sequence_length=LENGTH, against=model)
    (only,) = figures.texts.values()
    assert (only.kl_mean, only.kl_p99, only.kl_se) == (0, 0, 0)
    assert (only.top1_agreement, only.top1_se) == (1, 0)


def test_a_uniform_model_has_its_vocabulary_as_perplexity(tokenizer, text):
    model = tiny(0)
    torch.nn.init.zeros_(model.lm_head.weight)
    figures = evaluate(model, text, tokenizer=tokenizer, sequence_length=LENGTH).to_json()
    assert figures["perplexity"] == pytest.approx(VOCAB, rel=1e-6)
    assert figures["perplexity_se"] == pytest.approx(0, abs=1e-3)
    assert "kl_mean" not in figures


def test_token_statistics_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    reference = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    got = token_statistics(logits + 3, reference - 5, torch.tensor([2, 1]))
    assert got.nll.tolist() == pytest.approx([np.log(4), -np.log(0.8)])
    assert got.kl.tolist() == pytest.approx([0.25 * np.log(0.5) + 0.5 * np.log(2), 0], abs=1e-6)
    assert got.agree.tolist() == [0, 1]


def test_tokens_that_both_models_mask_cost_nothing():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    got = token_statistics(logits, logits, torch.tensor([0]))
    assert got.kl.tolist() == [0]
    got = token_statistics(logits, torch.zeros(1, 3), torch.tensor([0]))
    assert got.kl.tolist() == [torch.inf]


def test_in_bfloat16_the_softmax_is_in_float32():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    next_T = torch.arange(5)
    got = token_statistics(logits, None, next_T).nll
    want = token_statistics(logits.double(), None, next_T).nll
    assert torch.allclose(got, want, atol=1e-6)


def test_a_broken_model_is_counted_and_its_json_stays_valid(tokenizer, text):
    original, model = tiny(0), tiny(0)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    figures = evaluate(
        model, text, tokenizer=tokenizer, sequence_length=LENGTH, against=original
    ).to_json()
    assert figures["perplexity"] is None
    assert figures["kl_mean"] is None
    assert figures["top1_agreement"] is None
    assert figures["nonfinite_tokens"] == figures["tokens"]
    json.dumps(figures, allow_nan=False)

    # A broken original says nothing against the model's own perplexity.
    figures = evaluate(
        original, text, tokenizer=tokenizer, sequence_length=LENGTH, against=model
    ).to_json()
    assert figures["perplexity"] > 1
    assert figures["kl_mean"] is None


def test_a_perplexity_beyond_float64_is_null(tokenizer, text):
    model = tiny(0)
    with torch.no_grad():
        model.lm_head.weight *= 1e6
    figures = evaluate(model, text, tokenizer=tokenizer, sequence_length=LENGTH).to_json()
    assert figures["perplexity"] is None
    json.dumps(figures, allow_nan=False)


def test_one_window_has_no_standard_error(tokenizer, text):
    model = tiny(0)
    steps = []
    evaluation = evaluate(
        model,
        {"a": text, "b": str(text)},
        tokenizer=tokenizer,
        against=model,
        windows=1,
        progress=lambda done, total: steps.append((done, total)),
    )
    figures = evaluation.to_json()
    assert list(figures) == ["a", "b"]
    assert figures["a"]["sequence_length"] == 64  # the model's positions
    assert [figures["a"][name] for name in ("perplexity_se", "kl_se", "top1_se")] == [None] * 3
    assert steps == [(1, 2), (2, 2)]


def test_a_training_model_is_measured_without_dropout_and_goes_on_training(tokenizer, text):
    model = tiny(0)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    options = {"tokenizer": tokenizer, "sequence_length": LENGTH, "windows": 2}
    before = evaluate(model, text, **options)
    assert evaluate(model.train(), text, **options) == before
    assert model.training


def test_directories_are_loaded_with_their_tokenizers(tokenizer, text, tmp_path):
    for name, model in {"original": tiny(0), "quantized": noised(tiny(0))}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    figures = evaluate(
        tmp_path / "quantized", text, against=str(tmp_path / "original"), windows=2, device="cpu"
    ).to_json()
    assert figures["windows"] == 2
    assert figures["kl_mean"] > 0.01


# --- what cannot be measured ---


def test_other_vocabularies_and_tokenizers(tokenizer, text, tmp_path):
    with pytest.raises(DataError, match="Vocabularies of 4096 and 4097 tokens cannot be compared"):
        evaluate(tiny(0), text, tokenizer=tokenizer, against=tiny(0, vocab_size=4097))

    tiny(0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:1000]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="two models' tokenizers cut 'some' into different tokens"):
        evaluate(tiny(0), text, tokenizer=tokenizer, against=tmp_path)

    with pytest.raises(DataError, match="vocabulary ends at 999"):
        evaluate(tiny(0, vocab_size=1000), text, tokenizer=tokenizer)


def test_bad_input(tokenizer, text, tmp_path):
    model = tiny(0)
    short = tmp_path / "short.txt"
    short.write_text("Hello.")

    def fails(words, *arguments, error=DataError, **options):
        with pytest.raises(error, match=words):
            evaluate(*arguments, **{"tokenizer": tokenizer, **options})

    fails(r"short.txt gives \d tokens, but one window needs 64", model, short)
    fails("There is no file", model, tmp_path / "absent.txt")
    fails("plain text", model, tmp_path / "a.jsonl")
    fails("no text to evaluate on", model, {})
    fails(
        "more than the 64 positions of the model: choose at most 64",
        model,
        text,
        sequence_length=65,
    )
    fails("sequence length of 0 is too short", model, text, sequence_length=0)
    fails("windows must be at least 1", model, text, windows=0)
    fails("pass tokenizer=", model, text, tokenizer=None)
    fails("There is no directory", tmp_path / "absent", text, error=CheckpointError)
    fails("There is no directory", model, text, against=tmp_path / "absent", error=CheckpointError)
