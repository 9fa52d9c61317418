import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from bitfold.assets import DEMO_MODEL
from bitfold.errors import CheckpointError, RecipeError
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.load import load, load_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "checkpoint"))


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, drop: str = "", **added: torch.Tensor) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors.pop(drop, None)
    save_file(tensors | added, directory / WEIGHTS, metadata={"format": "pt"})


def shard(directory: Path) -> None:
    """Two shards and their index instead of one file."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_index(directory: Path, change) -> None:
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


# --- what loads ---


def test_the_demo_model_loads_quietly(capfd, checkpoint):
    model = load(str(checkpoint), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = load_file(checkpoint / WEIGHTS)[UP]
    assert torch.equal(model.model.layers[3].mlp.up_proj.weight, stored.float())
    assert len(load_tokenizer(checkpoint)) == 4096
    assert capfd.readouterr() == ("", "")


def test_shards_and_another_dtype(checkpoint):
    shard(checkpoint)
    assert load(checkpoint, device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_leftovers_of_other_parts_are_no_harm(checkpoint):
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(checkpoint, **{"vision.layers.0.weight": torch.ones(2), rotary: torch.ones(2)})
    load(checkpoint, device="cpu")


def quantize_to_int8(directory: Path) -> None:
    """The smallest compressed-tensors artifact: int8 weights per channel, nothing else."""
    tensors = load_file(directory / WEIGHTS)
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name].float() / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}
    change_config(
        directory,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"all": group},
            "ignore": ["lm_head"],
        },
    )


def test_a_compressed_tensors_artifact_loads_ready_to_run(checkpoint, capfd):
    original = load(checkpoint, device="cpu")
    quantize_to_int8(checkpoint)
    quantized = load(checkpoint, device="cpu")
    before = quantized.model.layers[3].mlp.up_proj.weight
    ids = torch.arange(20)[None]
    with torch.no_grad():
        error = (quantized(ids).logits - original(ids).logits).abs().max()
    assert 0 < error < 0.5
    assert quantized.model.layers[3].mlp.up_proj.weight is before
    assert before.dtype == torch.float32
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [UP, f"{UP}_scale"])
def test_an_artifact_without_a_weight_or_its_scale(checkpoint, name):
    quantize_to_int8(checkpoint)
    change_weights(checkpoint, drop=name)
    with pytest.raises(CheckpointError, match=re.escape(UP)):
        load(checkpoint, device="cpu")


# --- bad checkpoints: what is done to a good one, and the words the sentence must have ---


def only_pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def truncate(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def missing_shard(directory: Path) -> None:
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def index_of_another(directory: Path) -> None:
    shard(directory)
    change_index(
        directory, lambda weight_map: weight_map.update(other="model-00001-of-00002.safetensors")
    )


def index_outside(directory: Path) -> None:
    shard(directory)
    change_index(directory, lambda weight_map: weight_map.update(other="../secret.safetensors"))


def empty_index(directory: Path) -> None:
    shard(directory)
    (directory / INDEX).write_text("{}")


BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "broken config": (
        lambda d: (d / "config.json").write_text("{"),
        "config.json is not valid JSON",
    ),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
    "no model_type": (lambda d: (d / "config.json").write_text("{}"), "names no model_type"),
    "unknown model": (lambda d: change_config(d, model_type="warp"), "possible to load.*warp"),
    "bad field": (lambda d: change_config(d, hidden_size="big"), "possible to load.*hidden_size"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "has no weights"),
    "only a pickle": (only_pickle, "pytorch_model.bin, a pickle.*convert it to safetensors"),
    "truncated": (truncate, f"{WEIGHTS} is truncated or not a safetensors"),
    "garbage": (lambda d: (d / WEIGHTS).write_bytes(b"garbage" * 9), f"{WEIGHTS} is truncated or"),
    "empty": (lambda d: (d / WEIGHTS).write_bytes(b""), f"{WEIGHTS} is truncated or"),
    "missing shard": (
        missing_shard,
        f"has no model-00002-of-00002.safetensors, which {INDEX} names",
    ),
    "broken index": (lambda d: (shard(d), (d / INDEX).write_text("[")), f"{INDEX} is not valid"),
    "empty index": (empty_index, f"{INDEX} has no weight_map"),
    "index of another": (index_of_another, "does not hold other, as"),
    "index outside": (index_outside, "'../secret.safetensors', which is no file name"),
    "missing weight": (lambda d: change_weights(d, drop=UP), f"no weights for {UP}.*1 missing"),
    "more layers": (
        lambda d: change_config(d, num_hidden_layers=7),
        "no weights for model.layers.6",
    ),
    "fewer layers": (
        lambda d: change_config(d, num_hidden_layers=5),
        "no place for model.layers.5",
    ),
    "a bias": (
        lambda d: change_weights(d, **{UP.replace("weight", "bias"): torch.ones(768)}),
        "no place for model.layers.3.mlp.up_proj.bias",
    ),
    "another shape": (
        lambda d: change_config(d, intermediate_size=512),
        r"has shape \[256, 768\], but config.json makes it \[256, 512\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(checkpoint, case, capfd):
    break_it, words = BAD[case]
    break_it(checkpoint)
    with pytest.raises(CheckpointError, match=f"(?s){words}") as caught:
        load(checkpoint, device="cpu")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


BAD_TOKENIZER = {
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
    "not JSON": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json is not valid"),
    "no tokenizer in it": (
        lambda d: (d / "tokenizer.json").write_text("{}"),
        "possible to load the tok",
    ),
    "config": (lambda d: (d / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZER)
def test_bad_tokenizer(checkpoint, case):
    break_it, words = BAD_TOKENIZER[case]
    break_it(checkpoint)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(checkpoint)
    assert "\n" not in str(caught.value)


# --- names ---


def test_paths_that_are_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match=r"no directory .*absent"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no directory ./absent"):
        load("./absent")
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        load(DEMO_MODEL / "config.json")


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path, offline):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for function in (load, load_tokenizer):
        with pytest.raises(
            CheckpointError, match="'org/name' is not a local directory, and the hub"
        ):
            function("org/name")


def test_a_snapshot_in_the_cache_is_used_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(DEMO_MODEL, repository / "snapshots" / ("0" * 40))
    assert len(load_tokenizer("org/name")) == 4096
    assert load("org/name", device="cpu").config.vocab_size == 4096


# --- device and dtype ---


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = resolve_device("auto")
    assert cpu == torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("float16", cpu) == resolve_dtype(torch.float16, cpu) == torch.float16
    assert resolve_dtype("auto", torch.device("cuda")) == "auto"

    with pytest.raises(RecipeError, match="'cuda' was asked for, but PyTorch sees 0 CUDA devices"):
        resolve_device("cuda")
    with pytest.raises(RecipeError, match=r"Unknown device 'gpu'.*Known: auto, cpu, cuda"):
        resolve_device("gpu")
    with pytest.raises(RecipeError, match="Unknown device 'cuda:x'"):
        resolve_device("cuda:x")
    with pytest.raises(RecipeError, match="Unknown dtype 'float-16': did you mean 'float16'"):
        resolve_dtype("float-16", cpu)
    with pytest.raises(RecipeError, match=r"cannot run in torch.int8"):
        resolve_dtype(torch.int8, cpu)


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RecipeError, match=r"'cuda:2'.*sees 2 CUDA devices"):
        resolve_device("cuda:2")
