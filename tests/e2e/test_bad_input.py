"""What bad input is answered with: one sentence that names the culprit and the mend, and nothing is left behind.

Each case is a name, what is done beforehand, the command, and words that the sentence must have. `{model}` is a copy
of the embedded model, `{artifact}` of an artifact of it, `{out}` a free place, `{dir}` where they all lie.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Outcome, Run
from damage import (
    INDEX,
    WEIGHTS,
    cast,
    cut,
    drop,
    edit_config,
    edit_index,
    edit_json,
    flip_byte,
    poison,
    raw_header,
    shard,
    swap,
    write,
)

from bitfold.assets import CALIBRATION_TEXT, DEMO_MODEL
from models_zoo import build

QUANTIZE = "quantize {model} -o {out} --method rtn"
EVAL = "eval {model} --text {dir}/text.txt"
IN_VLLM = "verify {artifact} --engine vllm --engine-python"
CALIBRATED = f"{QUANTIZE} --method awq --sequence-length 64 --calibration"
RECIPE = "quantize {model} -o {out} --recipe {dir}/recipe.yaml"
UP = "model.layers.5.mlp.up_proj.weight"

Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """before: what is done in a directory that holds `model` and, where named, `artifact` and `text.txt`."""

    name: str
    before: Change | None
    command: str
    words: tuple[str, ...]
    code: int = 1


def case(name: str, before: Change | None, command: str, *words: str, code: int = 1) -> Case:
    return Case(name, before, command, words, code)


def model(change: Change) -> Change:
    return lambda directory: change(directory / "model")


def artifact(change: Change) -> Change:
    return lambda directory: change(directory / "artifact")


def sharded(change: Change) -> Change:
    def both(directory: Path) -> None:
        shard(directory / "model")
        change(directory / "model")

    return both


def array(name: str, values: np.ndarray) -> Change:
    return lambda directory: np.save(directory / name, values)


WEIGHTS_CASES = [
    case("NaN in the first block", model(poison("model.layers.0.self_attn.q_proj.weight", torch.nan)), QUANTIZE,
         "model.layers.0.self_attn.q_proj.weight", WEIGHTS, "1 of 65536 values", "NaN"),
    case("infinity in the last block", model(poison(UP, torch.inf)), QUANTIZE, UP, WEIGHTS, "infinite"),
    case("NaN in the embedding", model(poison("model.embed_tokens.weight", torch.nan)), QUANTIZE,
         "model.embed_tokens.weight", "NaN"),
    case("truncated weights", model(cut(WEIGHTS)), QUANTIZE, WEIGHTS, "truncated", "again"),
    case("garbage weights", model(write(WEIGHTS, b"garbage" * 99)), QUANTIZE, WEIGHTS, "not a safetensors"),
    case("empty weights", model(write(WEIGHTS, b"")), QUANTIZE, WEIGHTS, "truncated"),
    case("weights of an unknown dtype", model(write(WEIGHTS, raw_header("F8_E8M0"))), QUANTIZE,
         "odd", WEIGHTS, "F8_E8M0"),
    case("weights of integers", model(cast("model.layers.2.mlp.up_proj.weight", torch.int8)), QUANTIZE,
         "model.layers.2.mlp.up_proj.weight", WEIGHTS, "int8", "original"),
    case("weights of fp8", model(cast("model.norm.weight", torch.float8_e4m3fn)), QUANTIZE, "model.norm.weight",
         "float8_e4m3fn"),
    case("no weights", model(drop(WEIGHTS)), QUANTIZE, "has no weights", WEIGHTS),
    case("weights under another name", model(swap(WEIGHTS, "weights.safetensors")), QUANTIZE,
         "weights.safetensors", "rename"),
    case("only a pickle", model(swap(WEIGHTS, "pytorch_model.bin")), QUANTIZE, "pytorch_model.bin", "pickle",
         "convert it to safetensors"),
    case("missing shard", sharded(drop("model-00002-of-00002.safetensors")), QUANTIZE,
         "has no model-00002-of-00002.safetensors", INDEX),
    case("truncated shard", sharded(cut("model-00002-of-00002.safetensors")), QUANTIZE,
         "model-00002-of-00002.safetensors", "truncated"),
    case("index names another shard", model(edit_index(model__embed_tokens__weight="model-00002-of-00002.safetensors")),
         QUANTIZE, "model.embed_tokens.weight", "model-00002-of-00002.safetensors", INDEX),
    case("index names a tensor that is not there", model(edit_index(absent="model-00001-of-00002.safetensors")),
         QUANTIZE, "does not hold absent", INDEX),
    case("index leads out of the directory", model(edit_index(absent="../text.safetensors")), QUANTIZE,
         "'../text.safetensors'", "no file name"),
    case("broken index", sharded(write(INDEX, "{")), QUANTIZE, INDEX, "not valid JSON"),
    case("index without a map", sharded(write(INDEX, "{}")), QUANTIZE, INDEX, "weight_map"),
]  # fmt: skip

CONFIG_CASES = [
    case("no config", model(drop("config.json")), QUANTIZE, "has no config.json"),
    case("broken config", model(write("config.json", '{"model_type": ')), QUANTIZE, "config.json is not valid JSON"),
    case("empty config", model(write("config.json", "")), QUANTIZE, "config.json is empty"),
    case("config is a list", model(write("config.json", "[]")), QUANTIZE, "config.json", "object"),
    case("config without model_type", model(write("config.json", "{}")), QUANTIZE, "config.json", "model_type"),
    case("unknown family", model(edit_config(model_type="warp")), QUANTIZE, "'warp'", "llama", "to add one"),
    case("misspelt family", model(edit_config(model_type="lama")), QUANTIZE, "did you mean 'llama'"),
    case("another hidden size", model(edit_config(hidden_size=128)), QUANTIZE, "[4096, 256]", "[4096, 128]",
         "config.json"),
    case("too many layers", model(edit_config(num_hidden_layers=7)), QUANTIZE, "model.layers.6", "config.json"),
    case("too few layers", model(edit_config(num_hidden_layers=5)), QUANTIZE, "model.layers.5", "config.json"),
    case("no layers", model(edit_config(num_hidden_layers=0)), QUANTIZE, "config.json", "layer count"),
    case("another vocabulary", model(edit_config(vocab_size=5000)), QUANTIZE, "model.embed_tokens.weight", "5000"),
    case("heads that do not divide", model(edit_config(num_attention_heads=3)), QUANTIZE, "config.json", "3"),
    case("KV heads that do not divide", model(edit_config(num_key_value_heads=3)), QUANTIZE, "config.json"),
    case("a size that is text", model(edit_config(hidden_size="big")), QUANTIZE, "config.json", "hidden_size"),
    case("a negative size", model(edit_config(intermediate_size=-5)), QUANTIZE, "config.json"),
    case("an unknown activation", model(edit_config(hidden_act="zilu")), QUANTIZE, "config.json", "zilu"),
    case("quantized already", None, "quantize {artifact} -o {out}", "artifact", "quantized already",
         "compressed-tensors", "original"),
    case("odd quantization_config", model(edit_config(quantization_config="yes")), QUANTIZE, "quantization_config"),
    case("no such model", None, "quantize {dir}/nothing -o {out}", "nothing", "no directory"),
    case("model is a file", None, "quantize {model}/config.json -o {out}", "config.json is a file"),
    case("model is an empty directory", lambda d: (d / "empty").mkdir(), "quantize {dir}/empty -o {out}",
         "empty has no config.json"),
    case("model has an endless name", None, f"quantize {'x' * 300} -o {{out}}", "xxx", "name"),
    case("no tokenizer", model(drop("tokenizer.json")), f"{QUANTIZE} --method awq", "tokenizer.json", "copy"),
    case("broken tokenizer", model(write("tokenizer.json", "{")), f"{QUANTIZE} --method awq", "tokenizer.json",
         "not valid JSON"),
]  # fmt: skip

RECIPE_CASES = [
    case("no recipe file", None, RECIPE, "recipe.yaml", "no recipe file"),
    case("recipe is a directory", lambda d: (d / "recipe.yaml").mkdir(), RECIPE, "recipe.yaml", "no recipe file"),
    case("broken YAML", write("recipe.yaml", "scheme: [w4a16\nmethod: rtn"), RECIPE, "recipe.yaml", "not valid YAML",
         "line 2"),
    case("recipe of bytes", write("recipe.yaml", b"\xff\xfe\x00"), RECIPE, "recipe.yaml"),
    case("empty recipe", write("recipe.yaml", ""), RECIPE, "recipe.yaml", "bitfold recipes"),
    case("recipe is a list", write("recipe.yaml", "- awq"), RECIPE, "recipe.yaml", "bitfold recipes"),
    case("unknown key", write("recipe.yaml", "skeme: w4a16"), RECIPE, "'skeme'", "did you mean 'scheme'"),
    case("unknown method", None, f"{QUANTIZE} --method wizardry", "'wizardry'", "rtn", "awq"),
    case("misspelt method", None, f"{QUANTIZE} --method smothquant", "did you mean 'smoothquant'"),
    case("method that ends in a plus", None, f"{QUANTIZE} --method awq+", "'awq+'"),
    case("unknown method in a recipe", write("recipe.yaml", "method: wizardry"), RECIPE, "'wizardry'"),
    case("method is a list", write("recipe.yaml", "method: [rtn, awq]"), RECIPE, "method", "smoothquant+awq"),
    case("unknown transform", write("recipe.yaml", "transforms: [awk]"), RECIPE, "transform", "did you mean 'awq'"),
    case("transforms is a name", write("recipe.yaml", "transforms: awq"), RECIPE, "transforms"),
    case("unknown range", write("recipe.yaml", "weight_range: minmacks"), RECIPE, "range", "did you mean 'minmax'"),
    case("unknown rounding", write("recipe.yaml", "rounding: nearst"), RECIPE, "rounding", "did you mean 'nearest'"),
    case("unknown option", write("recipe.yaml", "transforms: [{awq: {step: 3}}]"), RECIPE, "awq",
         "did you mean 'steps'"),
    case("option of a wrong type", write("recipe.yaml", "transforms: [{awq: {steps: many}}]"), RECIPE, "awq", "steps",
         "'many'"),
    case("option out of range", write("recipe.yaml", "transforms: [{awq: {steps: 1}}]"), RECIPE, "awq", "steps"),
    case("option of wrong shape", write("recipe.yaml", "transforms: [{awq: 3}]"), RECIPE, "awq", "key: value"),
    case("seed is text", write("recipe.yaml", "seed: lucky"), RECIPE, "seed", "'lucky'"),
    case("stream that is none", write("recipe.yaml", "stream: both"), RECIPE, "stream", "'original' or 'quantized'"),
    case("ignore is text", write("recipe.yaml", "ignore: '*.q_proj'"), RECIPE, "ignore"),
    case("rule without match", write("recipe.yaml", "layers: [{scheme: w4a16}]"), RECIPE, "layers", "match"),
    case("rules are no list", write("recipe.yaml", "layers: {match: '*', scheme: w4a16}"), RECIPE, "layers"),
    case("rule of an impossible scheme", write("recipe.yaml", "layers: [{match: '*', scheme: w1a16}]"), RECIPE,
         "w1a16"),
    case("rule that matches nothing", write("recipe.yaml", "layers: [{match: '*.up', scheme: w8a16}]"), RECIPE,
         "'*.up'", "did you mean '*.up_proj'"),
    case("scheme is no notation", None, f"{QUANTIZE} --scheme 4bit", "'4bit'", "w4a16g128"),
    case("one bit", None, f"{QUANTIZE} --scheme w1a16", "'w1a16'", "2 to 8 bits"),
    case("nine bits", None, f"{QUANTIZE} --scheme w9a16", "'w9a16'", "2 to 8 bits"),
    case("group without bits", None, f"{QUANTIZE} --scheme w16a16g128", "'w16a16g128'", "group"),
    case("group of zero", None, f"{QUANTIZE} --scheme w4a16g0", "'w4a16g0'", "group"),
    case("nothing to do", None, f"{QUANTIZE} --scheme w16a16", "quantizes nothing"),
    case("group that does not divide", None, f"{QUANTIZE} --scheme w4a16g96", "96", "256", "q_proj", "g128"),
    case("group larger than the layer", None, f"{QUANTIZE} --scheme w4a16g512", "512", "256", "g128"),
    case("a rule for nearly lm_head", write("recipe.yaml", "layers: [{match: 'lm_*', scheme: w8a16}]"), RECIPE,
         "'lm_*'", "lm_head"),
    case("a rule for a tied lm_head", write("recipe.yaml", "layers: [{match: lm_head, scheme: w8a16}]"), RECIPE,
         "lm_head", "tied"),
    case("ignore everything", None, f"{QUANTIZE} --ignore *", "quantizes nothing", "'*'"),
    case("ignore nothing", None, f"{QUANTIZE} --ignore *.q_prog", "'*.q_prog'", "did you mean '*.q_proj'"),
    case("--set without =", None, f"{QUANTIZE} --set weight.symmetric", "weight.symmetric", "key=value"),
    case("--set of a misspelt key", None, f"{QUANTIZE} --set weight.symetric=true", "symetric",
         "did you mean 'symmetric'"),
    case("--set of an unknown tensor", None, f"{QUANTIZE} --set wait.symmetric=true", "'wait.symmetric'",
         "did you mean 'weight.symmetric'"),
    case("--set of a part the method lacks", None, f"{QUANTIZE} --set awq.steps=3", "'awq.steps'", "method rtn"),
    case("--set of broken YAML", None, f"{QUANTIZE} --set 'ignore=[a'", "ignore=[a"),
    case("--set of a wrong type", None, f"{QUANTIZE} --set weight.bits=few", "bits", "'few'"),
    case("--set of too many bits", None, f"{QUANTIZE} --set weight.bits=99", "bits", "99"),
    case("--set of activations left alone", None, f"{QUANTIZE} --set activation.static=true", "activation",
         "leaves the activation alone"),
    case("--set of too deep a key", None, f"{QUANTIZE} --set weight.bits.more=1", "weight.bits.more"),
    case("--set of a bare tensor", None, f"{QUANTIZE} --set weight=4", "weight"),
    case("--set of a scheme", None, f"{QUANTIZE} --set scheme=w9a16", "w9a16"),
    case("--set of endless depth", None, f"{QUANTIZE} --set a={'[' * 3000}", "--set", "YAML"),
    case("YAML of endless depth", write("recipe.yaml", "[" * 5000), RECIPE, "recipe.yaml", "not valid YAML"),
    case("negative seed", None, f"{QUANTIZE} --seed -1", "seed=-1"),
    case("endless seed", None, f"{QUANTIZE} --seed {10**30}", "seed=1000"),
    case("seed is no number", None, f"{QUANTIZE} --seed lucky", "--seed", "integer", "--help", code=2),
]  # fmt: skip

CALIBRATION_CASES = [
    case("zero samples", None, f"{QUANTIZE} --samples 0", "samples", "0"),
    case("negative samples", None, f"{QUANTIZE} --method awq --samples -3", "samples", "-3"),
    case("samples in words", None, f"{QUANTIZE} --samples many", "--samples", "integer", "--help", code=2),
    case("zero sequence length", None, f"{QUANTIZE} --sequence-length 0", "sequence length", "0"),
    case("negative sequence length", None, f"{QUANTIZE} --method awq --sequence-length -8", "sequence length", "-8"),
    case("sequence beyond the positions", None, f"{QUANTIZE} --sequence-length 513", "513", "512"),
    case("no calibration file", None, f"{CALIBRATED} {{dir}}/absent.txt", "absent.txt", "There is no file"),
    case("calibration is a directory", None, f"{CALIBRATED} {{dir}}", "directory"),
    case("empty calibration", write("a.txt", ""), f"{CALIBRATED} {{dir}}/a.txt", "a.txt is empty"),
    case("blank calibration", write("a.txt", "  \n"), f"{CALIBRATED} {{dir}}/a.txt", "a.txt", "white space"),
    case("unknown suffix", write("a.csv", "a,b"), f"{CALIBRATED} {{dir}}/a.csv", "a.csv", ".txt, .jsonl, .npy"),
    case("not UTF-8", write("a.txt", b"abc\xff"), f"{CALIBRATED} {{dir}}/a.txt", "a.txt", "UTF-8", "byte 3"),
    case("too short a text", write("a.txt", "Hello."), f"{CALIBRATED} {{dir}}/a.txt", "a.txt", "64"),
    case("broken JSON line", write("a.jsonl", '{"text": "a"}\n{"text"'), f"{CALIBRATED} {{dir}}/a.jsonl", "a.jsonl",
         "line 2"),
    case("JSON line without text", write("a.jsonl", '{"body": "a"}'), f"{CALIBRATED} {{dir}}/a.jsonl", "line 1",
         "'text'"),
    case("messages without a template", write("a.jsonl", '{"messages": []}'), f"{CALIBRATED} {{dir}}/a.jsonl", "line 1",
         "chat template"),
    case("ids of floats", array("a.npy", np.ones((4, 64))), f"{CALIBRATED} {{dir}}/a.npy", "a.npy", "float64",
         "integers"),
    case("ids in one row", array("a.npy", np.ones(64, int)), f"{CALIBRATED} {{dir}}/a.npy", "a.npy",
         "[samples, length]"),
    case("ids beyond the vocabulary", array("a.npy", np.full((4, 64), 4096)), f"{CALIBRATED} {{dir}}/a.npy", "a.npy",
         "4096", "4095"),
    case("negative ids", array("a.npy", np.full((4, 64), -1)), f"{CALIBRATED} {{dir}}/a.npy", "a.npy", "-1"),
    case("pickled ids", array("a.npy", np.array([[{}]], dtype=object)), f"{CALIBRATED} {{dir}}/a.npy", "a.npy",
         "pickles are refused"),
    case("garbage ids", write("a.npy", b"garbage"), f"{CALIBRATED} {{dir}}/a.npy", "a.npy", "NumPy"),
    case("no ids", array("a.npy", np.ones((0, 64), int)), f"{CALIBRATED} {{dir}}/a.npy", "a.npy", "at least 1 row"),
    case("text and ids", array("a.npy", np.ones((4, 64), int)),
         f"{CALIBRATED} {{dir}}/a.npy --calibration {CALIBRATION_TEXT}", "a.npy", "mixed"),
]  # fmt: skip

OUTPUT_CASES = [
    case("output is a file", write("out", "mine"), QUANTIZE, "out", "exists", "-o"),
    case("output is a directory of others", lambda d: write("file", "mine")(_made(d / "out")), QUANTIZE, "out",
         "not made by bitfold"),
    case("output is a link", lambda d: (d / "out").symlink_to(d / "model"), QUANTIZE, "out", "exists"),
    case("output is a dangling link", lambda d: (d / "out").symlink_to(d / "absent"), QUANTIZE, "out", "exists"),
    case("output is the model", None, "quantize {artifact} -o {artifact} --overwrite", "artifact", "model itself"),
    case("output lies in a file", write("file", "mine"), "quantize {model} -o {dir}/file/out", "file",
         "no directory"),
    case("output lies where nothing can be made", None, "quantize {model} -o /proc/bitfold/out", "/proc"),
    case("output has an endless name", None, f"quantize {{model}} -o {{dir}}/{'x' * 300}", "too long"),
    case("the working place is taken", lambda d: write("file", "mine")(_made(d / ".out.partial")), QUANTIZE,
         ".out.partial", "not made by bitfold"),
    case("another recipe", None, "quantize {model} -o {artifact} --scheme w8a16", "artifact", "--overwrite"),
    case("unknown device", None, f"{QUANTIZE} --device gpu", "'gpu'", "cuda"),
    case("no such GPU", None, f"{QUANTIZE} --device cuda:99", "cuda:99"),
    case("unknown dtype", None, f"{QUANTIZE} --dtype float-16", "'float-16'", "did you mean 'float16'"),
    case("integer dtype", None, f"{QUANTIZE} --dtype int8", "'int8'", "float32"),
    case("--device of eval", None, f"{EVAL} --device gpu", "'gpu'"),
]  # fmt: skip

OTHER_CASES = [
    case("eval without text", None, "eval {model}", "--text", code=2),
    case("eval of a missing text", None, "eval {model} --text {dir}/absent.txt", "absent.txt"),
    case("eval of an empty text", write("a.txt", ""), "eval {model} --text {dir}/a.txt", "a.txt is empty"),
    case("eval of too short a text", write("a.txt", "Hello."), "eval {model} --text {dir}/a.txt", "a.txt", "512"),
    case("eval of JSON lines", write("a.jsonl", "{}"), "eval {model} --text {dir}/a.jsonl", "a.jsonl", "plain text"),
    case("eval of two texts of one name", None, f"{EVAL} --text {{dir}}/text.txt", "'text'", "NAME=FILE"),
    case("eval of a text without a name", None, "eval {model} --text ={dir}/text.txt", "[NAME=]FILE"),
    case("eval beyond the positions", None, f"{EVAL} --sequence-length 9999", "9999", "512"),
    case("eval of no sequence", None, f"{EVAL} --sequence-length 0", "sequence length", "0"),
    case("eval of nothing", None, "eval {dir}/nothing --text {dir}/text.txt", "nothing"),
    case("eval against nothing", None, f"{EVAL} --against {{dir}}/nothing", "nothing"),
    case("eval against another vocabulary", lambda d: _small_vocabulary(d), f"{EVAL} --against {{dir}}/small",
         "4096", "96"),
    case("eval of missing questions", None, "eval {model} --tasks {dir}/absent.jsonl", "absent.jsonl"),
    case("eval of a broken question", write("a.jsonl", '{"question": "Q"}'), "eval {model} --tasks {dir}/a.jsonl",
         "a.jsonl, line 1", "choices"),
    case("eval of no task", None, "eval {model} --tasks ,", "no task"),
    case("eval of no window", None, f"{EVAL} --limit 0", "windows", "0"),
    case("eval by missing logits", None, "eval {model} --kl-base {dir}/absent.kld", "absent.kld", "--write"),
    case("eval by a text for logits", None, "eval {model} --kl-base {dir}/text.txt", "text.txt", "_logits_"),
    case("eval that writes nowhere", None, f"{EVAL} --kl-base {{dir}}/absent/a.kld --write", "no directory"),
    case("eval that writes over a file", None, f"{EVAL} --kl-base {{dir}}/text.txt --write", "text.txt", "already"),
    case("eval that writes without a name", None, f"{EVAL} --write", "--kl-base", code=2),
    case("eval that writes without a text", None, "eval {model} --kl-base {out} --write", "--text", code=2),
    case("eval that writes against another", None, f"{EVAL} --kl-base {{out}} --write --against {{model}}",
         "--against", code=2),
    case("eval of logits against another", None, "eval {model} --kl-base {out} --against {model}", "--against", code=2),
    case("eval of logits in other windows", None, "eval {model} --kl-base {out} --sequence-length 64",
         "--sequence-length", code=2),
    case("verify of an original", None, "verify {model}", "model", "no artifact of bitfold"),
    case("verify of nothing", None, "verify {dir}/nothing", "nothing"),
    case("verify of a flipped bit", artifact(flip_byte("model-00007-of-00007.safetensors",
         "model.layers.5.mlp.up_proj.weight_packed")), "verify {artifact}",
         "model.layers.5.mlp.up_proj.weight_packed", "model-00007-of-00007.safetensors"),
    case("verify of a truncated shard", artifact(cut("model-00003-of-00007.safetensors")), "verify {artifact}",
         "model-00003-of-00007.safetensors", "truncated"),
    case("verify without a shard", artifact(drop("model-00003-of-00007.safetensors")), "verify {artifact}",
         "model-00003-of-00007.safetensors"),
    case("verify without a probe", artifact(drop("verification.npz")), "verify {artifact}", "verification.npz",
         "quantize again"),
    case("verify of a broken probe", artifact(cut("verification.npz")), "verify {artifact}", "verification.npz",
         "damaged"),
    case("verify without checksums", artifact(drop("checksums.json")), "verify {artifact}", "checksums"),
    case("verify of checksums of less", artifact(write("checksums.json", "{}")), "verify {artifact}", "artifact"),
    case("verify of an edited config", artifact(edit_config(rms_norm_eps=0.5)), "verify {artifact}", "artifact",
         "differ"),
    case("verify of a config of another size", artifact(edit_config(hidden_size=128)), "verify {artifact}",
         "config.json"),
    case("verify of a broken provenance", artifact(edit_json("provenance.json", bitfold=[])), "verify {artifact}",
         "provenance.json"),
    case("verify in an unknown engine", None, f"{IN_VLLM} python".replace("vllm", "vlm"), "vlm", "did you mean 'vllm'"),
    case("verify in an engine that is nowhere", None, "verify {artifact} --engine vllm", "--engine-python",
         "scripts/make_vllm_environment.sh", code=2),
    case("verify in no python", None, f"{IN_VLLM} {{dir}}/nothing", "nothing", "give the python"),
    case("verify in a python without vLLM", None, f"{IN_VLLM} {sys.executable}", sys.executable, "has no vLLM"),
    case("verify of an original in vLLM", None, f"{IN_VLLM} python".replace("{artifact}", "{model}"), "model",
         "no artifact of bitfold"),
    case("verify on a text in no engine", None, "verify {artifact} --text {dir}/text.txt", "--engine vllm", code=2),
    case("inspect of nothing", None, "inspect {dir}/nothing", "nothing"),
    case("inspect of a text", None, "inspect {dir}/text.txt", "text.txt is a file"),
    case("inspect of a directory", None, "inspect {dir}", "config.json"),
    case("inspect of a broken report", artifact(write("report.json", "{")), "inspect {artifact}", "report.json"),
    case("generate of nothing", None, "generate {dir}/nothing --prompt hello", "nothing"),
    case("generate from nothing", None, "generate {model} --prompt ''", "prompt", "empty"),
    case("generate from bytes", None, f"generate {{model}} --prompt {os.fsdecode(bytes([97, 255]))}", "prompt",
         "UTF-8"),
    case("generate without a prompt", None, "generate {model}", "--prompt", code=2),
    case("generate nothing", None, "generate {model} --prompt hello --max-new-tokens 0", "new tokens", "0"),
    case("generate too much", None, "generate {model} --prompt hello --max-new-tokens 9999", "512"),
    case("recipes of an unknown name", None, "recipes smothquant", "did you mean 'smoothquant'"),
    case("misspelt command", None, "quantise {model} -o {out}", "'quantise'", "did you mean 'quantize'?", code=2),
    case("unknown command", None, "frobnicate", "'frobnicate'", "quantize", code=2),
    case("misspelt option", None, f"{QUANTIZE} --skeme w4a16", "--skeme", "did you mean '--scheme'?", code=2),
    case("unknown option", None, f"{QUANTIZE} --frobnicate", "--frobnicate", "--scheme", code=2),
    case("option without a value", None, f"{QUANTIZE} --scheme", "--scheme", code=2),
    case("no output", None, "quantize {model}", "-o", code=2),
    case("two models", None, "quantize {model} {model} -o {out}", "model", code=2),
]  # fmt: skip

CASES = [
    *WEIGHTS_CASES,
    *CONFIG_CASES,
    *RECIPE_CASES,
    *CALIBRATION_CASES,
    *OUTPUT_CASES,
    *OTHER_CASES,
]


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _small_vocabulary(directory: Path) -> None:
    """A model of 96 tokens that has the embedded model's tokenizer."""
    small = build("llama", torch.float32, _made(directory / "small"))
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, small)


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory, with size and time of change."""
    return {
        str(path.relative_to(directory)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in directory.rglob("*")
    }


def check_sentence(outcome: Outcome, words: tuple[str, ...], code: int) -> None:
    """One sentence on stderr, the same in one JSON object on stdout."""
    assert outcome.code == code, outcome
    assert outcome.json.keys() == {"error", "kind"}
    sentence = outcome.json["error"]
    assert outcome.err.endswith(f"Error: {sentence}\n")
    assert sentence.endswith(".")
    assert not sentence.endswith("..")
    first = sentence.split()[0]  # a capital, or a name that is as it is
    assert first[0].isupper() or not first.isalpha(), sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    for word in words:
        assert word in sentence, sentence


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_bad_input(bad: Case, run: Run, tmp_path: Path, finished: Path) -> None:
    if "{model}" in bad.command:
        shutil.copytree(DEMO_MODEL, tmp_path / "model")
    if "{artifact}" in bad.command:
        shutil.copytree(finished, tmp_path / "artifact")
    (tmp_path / "text.txt").write_text(CALIBRATION_TEXT.read_text()[:8000])
    if bad.before is not None:
        bad.before(tmp_path)
    before = snapshot(tmp_path)
    names = {name: tmp_path / name for name in ("model", "artifact", "out")}
    command, _, arguments = bad.command.format(**names, dir=tmp_path).partition(" ")
    outcome = run(f"{command} --json {arguments}")
    check_sentence(outcome, bad.words, bad.code)
    assert snapshot(tmp_path) == before
