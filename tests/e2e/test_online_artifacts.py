"""A method that leaves matrices to run says so everywhere, loads exactly, and never where it would be ignored."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.errors import CheckpointError, RecipeError
from bitfold.pipeline import quantize as pipeline
from bitfold.pipeline.job import Job
from models_zoo import TOKENS, Zoo, build

FLOAT32 = torch.float32
WIDTH, BLOCKS, NORMS = 64, 2, 4
OPTIONS = {"scheme": "w4a16g32", "samples": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", torch.bfloat16, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def online(model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of affine-online, not to be changed."""
    return _quantize(model, tokens, tmp_path_factory.mktemp("out") / "online")


def _quantize(
    model: Path, tokens: Path, out: Path, method: str = "affine-online", **more: Any
) -> Path:
    options = OPTIONS | {"set": ("affine.epochs=2", "affine.scale_rate=0.005")} | more
    bitfold.quantize(model, out, method=method, calibration=tokens, **options)
    return out


def _tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def _logits(path: Path, **options: Any) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path, **options).eval()(TOKENS).logits


def _settings(path: Path) -> dict[str, Any]:
    settings = json.loads((path / "config.json").read_text())["quantization_config"]
    assert isinstance(settings, dict)
    return settings


# --- the command line ---


def test_the_commands_say_what_it_costs(
    model: Path, tokens: Path, tmp_path: Path, run: Run
) -> None:
    line = (
        f"{model} -o {tmp_path}/out --method affine-online --calibration {tokens} --scheme w4a16g32"
    )
    shown = run(f"quantize {line} --set affine.epochs=1")
    assert shown.code == 0
    # 4 matrices of 64²; a block has q 64², k and v 32 · 64, o 64², and three of 64 · 96.
    linear = BLOCKS * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    added = NORMS * WIDTH**2
    sentence = f"Not folded: {NORMS} maps run at inference, {added:,} operations a token more"
    assert sentence in shown.out
    assert f"({added / linear:.1%} of the linear layers'" in shown.out
    assert "import bitfold" in shown.out

    again = run(f"quantize {line} --set affine.epochs=1 --json").json
    assert again["finished_before"]
    cost = again["online"]
    assert cost["operations"] == added
    assert cost["linear_multiply_adds"] == linear
    assert cost["share"] == added / linear
    assert cost["bytes"] == 2 * added
    assert cost["folded"] is False
    assert again["bits_per_weight"] < 5.1  # of the quantized matrices alone
    files = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert again["size_bytes"] == files

    assert run(f"inspect {tmp_path}/out --json").json["online"] == cost
    inspected = run(f"inspect {tmp_path}/out").out
    assert "Not folded" in inspected
    assert cost["note"] in (tmp_path / "out" / "README.md").read_text()
    assert run(f"verify {tmp_path}/out").code == 0
    assert "affine-online" in run("recipes").out
    assert "not folded" in run("recipes --json").json["affine-online"]["summary"]


def test_the_disk_it_takes_is_known_before(model: Path, tokens: Path, tmp_path: Path) -> None:
    made, folded = (
        bitfold.quantize(
            model, tmp_path / "out", method=method, calibration=tokens, dry_run=True, **OPTIONS
        ).size_bytes
        for method in ("affine-online", "affine")
    )
    assert made - folded > 2 * NORMS * WIDTH**2


# --- the artifact ---


def test_it_loads_and_gives_the_logits_of_the_simulation(online: Path) -> None:
    settings = _settings(online)
    assert settings["quant_method"] == "bitfold"
    [group] = settings["online"]
    assert (group["kind"], group["shape"]) == ("blocks", [1, WIDTH])
    names = {f"{module}.online.weight" for module in group["modules"]}
    assert len(names) == NORMS
    stored = _tensors(online)
    assert {name for name in stored if "online" in name} == names
    assert {stored[name] for name in names} == {("BF16", (1, WIDTH, WIDTH))}
    assert bitfold.verify(online).difference == 0
    loaded = bitfold.load(online)
    matrix = loaded.get_parameter(min(names))
    assert matrix.dtype == FLOAT32
    assert torch.equal(matrix, matrix.bfloat16().float())
    assert (matrix - torch.eye(WIDTH)).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["opt", "gemma3", "qwen2"])
def test_every_kind_of_norm(family: str, checkpoint: Zoo, tokens: Path, tmp_path: Path) -> None:
    """A LayerNorm with shifts, gains less one, a tied head."""
    out = _quantize(checkpoint(family, FLOAT32), tokens, tmp_path / "out")
    report = json.loads((out / "report.json").read_text())
    assert max(report["folding_errors"]) < 1e-5
    for fits in report["fits"]:
        assert fits[0]["best"] <= fits[0]["start"]
    assert report["online"]["maps"] == NORMS
    assert bitfold.verify(out).difference == 0


def test_with_quantized_activations_and_keys(model: Path, tokens: Path, tmp_path: Path) -> None:
    out = _quantize(model, tokens, tmp_path / "out", scheme="w4a4q4kv4")
    assert bitfold.verify(out).difference == 0


def test_a_fit_that_finds_nothing_leaves_identities(
    model: Path, tokens: Path, tmp_path: Path
) -> None:
    nothing = ("wush.norms=none", "affine.epochs=0")
    out = _quantize(model, tokens, tmp_path / "out", set=nothing)
    loaded = bitfold.load(out)
    for module in _settings(out)["online"][0]["modules"]:
        assert torch.equal(loaded.get_parameter(f"{module}.online.weight")[0], torch.eye(WIDTH))
    assert bitfold.verify(out).ok


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("affine-online+awq", ("affine.epochs=1",)),
        ("affine-online+gptq", ("affine.epochs=1",)),
        ("affine-online+qep", ("affine.epochs=1",)),
        ("wush", ("wush.norms=online",)),
        ("affine", ("wush.norms=online", "affine.epochs=1")),
        ("affine", ("affine.norms=online", "affine.epochs=1")),
    ],
)
def test_several_transforms_behind_a_norm(
    method: str, options: tuple[str, ...], model: Path, tokens: Path, tmp_path: Path
) -> None:
    """Matrices are multiplied, diagonals go into them: one runs in the end."""
    out = _quantize(model, tokens, tmp_path / "out", method=method, set=options)
    assert len([name for name in _tensors(out) if "online" in name]) == NORMS
    assert max(json.loads((out / "report.json").read_text())["folding_errors"]) < 1e-5
    assert bitfold.verify(out).difference == 0


def test_it_is_saved_copied_and_generates(online: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(online, dtype=FLOAT32)
    loaded.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = loaded(TOKENS).logits
        assert torch.equal(deepcopy(loaded)(TOKENS).logits, expected)
    assert torch.equal(_logits(tmp_path / "again", dtype=FLOAT32), expected)
    new = loaded.generate(TOKENS[1:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():  # without the cache
        assert torch.equal(loaded(new).logits[:, 7:-1].argmax(-1), new[:, 8:])


def test_in_half_precision(model: Path, tokens: Path, tmp_path: Path) -> None:
    out = _quantize(model, tokens, tmp_path / "out", dtype="bfloat16")
    assert bitfold.verify(out).difference < 0.02
    assert _logits(out, dtype=torch.bfloat16).isfinite().all()


def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Path, tokens: Path, online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.step

    def step(job: Job, index: int, *arguments: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return real(job, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "step", step)
        with pytest.raises(KeyboardInterrupt):
            _quantize(model, tokens, tmp_path / "out")
    out = _quantize(model, tokens, tmp_path / "out")
    assert (out / "checksums.json").read_bytes() == (online / "checksums.json").read_bytes()


def test_nothing_of_a_folded_run_changes(model: Path, tokens: Path, tmp_path: Path) -> None:
    """The tensors, the format and the configuration of plain rtn; not a word of what runs."""
    folded = _quantize(model, tokens, tmp_path / "folded", method="affine")
    plain = _quantize(model, tokens, tmp_path / "plain", method="rtn", set=())
    assert _tensors(folded) == _tensors(plain)
    assert (folded / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    assert "online" not in json.loads((folded / "report.json").read_text())
    assert "folded:" not in (folded / "README.md").read_text()


# --- where it would be ignored ---

WITHOUT_BITFOLD = """
import sys
from transformers import AutoModelForCausalLM

try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], **eval(sys.argv[2]))
except (ValueError, RuntimeError) as error:
    print(type(error).__name__, error)
else:
    sys.exit("it was loaded by a transformers that does not know what runs")
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, 'ValueError Specified `attn_implementation="bitfold"`'),
        ({"attn_implementation": "sdpa"}, "RuntimeError"),
    ],
)
def test_it_does_not_load_without_bitfold(
    options: dict[str, str], said: str, online: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_BITFOLD, str(online), repr(options)],
        check=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(said)


def _changed(online: Path, out: Path, change: Any) -> Path:
    """A copy of an artifact with another `quantization_config` and other tensors of the first block."""
    out.mkdir()
    for file in online.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text())
    shard = out / "model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    change(config["quantization_config"], tensors)
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    kept = {n: s for n, s in index["weight_map"].items() if s != shard.name or n in tensors}
    index["weight_map"] = kept
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


MATRIX = "model.layers.0.input_layernorm.online.weight"


def _set(key: str, value: object) -> Any:
    return lambda settings, tensors: settings["online"][0].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings, tensors: settings.pop("online"), r"no place for .*online\.weight"),
        (lambda settings, tensors: tensors.pop(MATRIX), rf"no weights for {MATRIX}"),
        (lambda settings, tensors: tensors.update({MATRIX: torch.ones(2, 32, 32)}), "has shape"),
        (_set("shape", [1, 32]), "a map for 32 features at .*another width"),
        (_set("modules", ["model.layers.9.input_layernorm"]), "has no such module"),
        (_set("modules", ["model.layers.0.mlp"]), "at model.layers.0.mlp,"),
        (_set("kind", "hadamard"), "is damaged"),
    ],
)
def test_a_damaged_artifact(change: Any, message: str, online: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        bitfold.load(_changed(online, tmp_path / "out", change))


def test_what_cannot_be_asked_for(model: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="would drop them unseen"):
        _quantize(model, tokens, tmp_path / "out", scheme="w16a4")
    with pytest.raises(RecipeError, match="leave out matrices=diagonal"):
        _quantize(model, tokens, tmp_path / "out", set=("affine.matrices=diagonal",))
    norms_after = build("opt-350m", FLOAT32, tmp_path / "model")
    with pytest.raises(RecipeError, match=r"no norm of this opt .*choose another --method"):
        _quantize(norms_after, tokens, tmp_path / "out")
    assert not (tmp_path / "out").exists()
