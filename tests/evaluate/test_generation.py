import json
import subprocess
import sys

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from bitfold.assets import DEMO_MODEL
from bitfold.errors import DataError
from bitfold.evaluate import generate, peak_rss_mb
from bitfold.runtime.load import load, load_tokenizer

PROMPT = "The European lobster is a species"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ).eval()


def opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=4096,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.3,
    )
    return OPTForCausalLM(config).eval()


def transformers_greedy(model, tokenizer, max_new_tokens) -> list[int]:
    encoded = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**encoded, do_sample=False, max_new_tokens=max_new_tokens)
    return output[0, encoded["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("make", [llama, opt, lambda: load(DEMO_MODEL, device="cpu")])
def test_tokens_are_those_of_transformers(make, tokenizer):
    model = make()
    result = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20)
    assert list(result.tokens) == transformers_greedy(model, tokenizer, 20)
    assert result.text == tokenizer.decode(result.tokens, skip_special_tokens=True)
    assert result.prompt_tokens == len(tokenizer(PROMPT)["input_ids"])
    assert result.new_tokens == 20
    assert result.prefill_seconds > 0
    assert result.decode_tokens_per_second > 0
    assert result.peak_rss_mb > 50
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize("as_list", [True, False])
def test_generation_stops_at_the_end_of_sequence(tokenizer, as_list):
    model = llama()
    tokens = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20).tokens
    stop = tokens[5]
    model.generation_config.eos_token_id = [4095, stop] if as_list else stop
    shorter = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20).tokens
    assert shorter == tokens[: tokens.index(stop) + 1]
    assert list(shorter) == transformers_greedy(model, tokenizer, 20)


def test_one_token_has_no_decoding_speed():
    result = generate(DEMO_MODEL, PROMPT, max_new_tokens=1, device="cpu")
    assert result.new_tokens == 1
    assert result.decode_tokens_per_second is None


def test_the_last_position_may_be_used(tokenizer):
    room = 64 - len(tokenizer(PROMPT)["input_ids"])
    assert generate(llama(), PROMPT, tokenizer=tokenizer, max_new_tokens=room).new_tokens == room
    with pytest.raises(DataError, match=f"64 positions: ask for at most {room} new tokens"):
        generate(llama(), PROMPT, tokenizer=tokenizer, max_new_tokens=room + 1)


def test_bad_input(tokenizer):
    model = llama()
    with pytest.raises(DataError, match="The prompt is empty"):
        generate(model, "", tokenizer=tokenizer)
    with pytest.raises(DataError, match="leave none of the model's 64 positions: shorten it"):
        generate(model, "word " * 100, tokenizer=tokenizer)
    with pytest.raises(DataError, match="new tokens must be at least 1, not 0"):
        generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=0)
    with pytest.raises(DataError, match="pass tokenizer="):
        generate(model, PROMPT)
    model.resize_token_embeddings(10)
    with pytest.raises(DataError, match="the model's vocabulary ends at 9"):
        generate(model, PROMPT, tokenizer=tokenizer)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_peak_memory_is_not_that_of_the_parent():
    ours = peak_rss_mb()
    assert ours >= psutil.Process().memory_info().rss / 2**20 - 1
    path = sys.modules["bitfold.evaluate.memory"].__file__
    code = f"import runpy; print(runpy.run_path({path!r})['peak_rss_mb']())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < ours / 2
