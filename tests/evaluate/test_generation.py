import json
import subprocess
import sys

import psutil
import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import DataError, RecipeError
from bitfold.evaluate import generate, peak_rss_mb
from bitfold.runtime.kv_cache import quantized_cache
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


def test_an_ordinary_cache_is_measured(tokenizer):
    model = llama()
    result = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20)
    seen = result.prompt_tokens + 19  # the last token is never fed
    assert result.cache_bytes == 2 * 2 * seen * 32 * 4
    assert result.cache_bytes_per_token == 2 * 2 * 32 * 4
    assert result.cache_bytes_bf16 == result.cache_bytes // 2
    assert result.cache_notes == ()


@pytest.mark.parametrize("make", [llama, opt])
def test_bits_of_the_cache(make, tokenizer):
    """With 8 the text is as it was; the memory is that of the bits, and the model stays as it is."""
    model = make()
    plain = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20)
    found = {
        bits: generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20, kv_bits=bits)
        for bits in (8, 4, 2)
    }
    assert found[8].tokens == plain.tokens
    assert found[2].cache_bytes < found[4].cache_bytes < found[8].cache_bytes < plain.cache_bytes
    assert {one.cache_bytes_bf16 for one in found.values()} == {plain.cache_bytes_bf16}
    again = generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=20)
    assert again.tokens == plain.tokens


@pytest.mark.parametrize(
    "sets", [(), ("key.granularity=channel", "key.group_size=8"), ("key.static=true",)]
)
def test_an_artifact_has_its_own_cache(sets, tmp_path):
    """By itself, and the text is that of an ordinary one, which is fake-quantized in every pass."""
    bitfold.quantize(DEMO_MODEL, tmp_path / "out", method="rtn", scheme="w4a16kv4", set=sets)
    packed = generate(tmp_path / "out", PROMPT, max_new_tokens=30, device="cpu", exact=True)
    model, tokenizer = load(tmp_path / "out", device="cpu"), load_tokenizer(tmp_path / "out")
    plain = generate(
        model,
        PROMPT,
        tokenizer=tokenizer,
        max_new_tokens=30,
        cache=DynamicCache(config=model.config),
    )
    assert packed.tokens == plain.tokens
    assert packed.cache_bytes < 0.2 * plain.cache_bytes + 32 * plain.cache_bytes_per_token
    again = generate(
        model, PROMPT, tokenizer=tokenizer, max_new_tokens=30, cache=quantized_cache(model)
    )
    assert again.tokens == packed.tokens
    assert again.cache_bytes == packed.cache_bytes
    with pytest.raises(RecipeError, match="a scheme of its own: leave out"):
        generate(model, PROMPT, tokenizer=tokenizer, kv_bits=4)


def test_bad_caches(tokenizer):
    model = llama()
    with pytest.raises(RecipeError, match="2 to 8 bits, not 16: choose 4"):
        generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=8, kv_bits=16)
    used = quantized_cache(model, 4)
    with pytest.raises(DataError, match="has bits of its own: leave out kv_bits"):
        generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=8, kv_bits=4, cache=used)
    generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=2, cache=used)
    with pytest.raises(DataError, match="tokens of another text: give an empty one"):
        generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=8, cache=used)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_peak_memory_is_not_that_of_the_parent():
    ours = peak_rss_mb()
    assert ours >= psutil.Process().memory_info().rss / 2**20 - 1
    path = sys.modules["bitfold.evaluate.memory"].__file__
    code = f"import runpy; print(runpy.run_path({path!r})['peak_rss_mb']())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 < float(child.stdout) < ours / 2
