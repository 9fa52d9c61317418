"""A graph of torch.export computes what the artifact computes, without bitfold, and damage to it is named."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from exact_models import exactly, flip, quantized
from tiny_artifacts import everywhere, logits, quantize, scheme, simulate, write

from bitfold.engines.torch_program import TorchProgram
from bitfold.engines.verify_torch import verify_torch
from bitfold.errors import CheckpointError, ExportError, OutputError, VerificationError
from bitfold.export import compressed_tensors, native
from bitfold.export.exporting import export_to
from bitfold.runtime.load import load
from models_zoo import TOKENS, Zoo

FAMILIES = ["llama-biased", "mistral", "gemma3", "opt-350m"]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of the logits, over their spread."""
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_themselves(family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    model = checkpoint(family, torch.float32)
    export_to(model, "torch", tmp_path / "model")
    engine, tokens = TorchProgram(tmp_path / "model"), TOKENS[0]
    with torch.no_grad():
        expected = exactly(model)(TOKENS[:1]).logits[0]
    assert distance(engine.logits(tokens), expected) < 1e-5
    # In pieces, each going on from the cache.
    engine.start()
    pieces = [engine.decode(tokens[:7].tolist()), engine.decode(tokens[7:9].tolist())]
    pieces += [engine.decode([int(token)]) for token in tokens[9:]]
    assert distance(torch.cat(pieces), expected) < 1e-5


# The format of the artifact, its scheme, and the dtype of the checkpoint.
SCHEMES = {
    "w4a16g32": (compressed_tensors, scheme("w4a16g32"), torch.bfloat16),
    "w3a16": (native, scheme("w3a16g32"), torch.float32),
    "w8a8": (compressed_tensors, scheme("w8a8"), torch.float32),
    "w8a8, static": (
        compressed_tensors,
        scheme("w8a8", symmetric=True, static=True),
        torch.bfloat16,
    ),
    "fp8": (compressed_tensors, scheme("wfp8afp8"), torch.float32),
    "nf4": (native, scheme("wnf4a16g32"), torch.bfloat16),
    "nvfp4": (compressed_tensors, scheme("wnvfp4anvfp4"), torch.bfloat16),
    "mxfp4": (native, scheme("wmxfp4a16"), torch.float32),
}


@pytest.mark.parametrize("case", SCHEMES)
def test_schemes_are_the_simulation(case: str, checkpoint: Zoo, tmp_path: Path) -> None:
    format, asked, dtype = SCHEMES[case]
    made = quantize(checkpoint("qwen2", dtype), everywhere(asked))
    choice = write(made, tmp_path / "artifact", format)
    exported = export_to(tmp_path / "artifact", "torch", tmp_path / "model")
    expected = logits(simulate(made, choice, torch.float32))
    engine = TorchProgram(tmp_path / "model")
    found = torch.stack([engine.logits(tokens) for tokens in TOKENS])
    difference = float((found - expected).square().mean().sqrt() / expected.std())
    # Where inputs are rounded, sums in another order now and then make another integer.
    assert difference < (1e-6 if asked.activation is None else 0.03)
    assert any(kind.endswith("bits") for kind in exported.types)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(tmp_path_factory.mktemp("torch") / "artifact", "w4a16g128")


@pytest.fixture(scope="module")
def directory(artifact: Path) -> Path:
    out = artifact.parent / "model"
    export_to(artifact, "torch", out)
    return out


ALONE = """
import sys
sys.modules["bitfold"] = sys.modules["transformers"] = sys.modules["compressed_tensors"] = None
import numpy, torch
program = torch.export.load(sys.argv[1] + "/model.pt2")
run = program.module()
tokens = torch.from_numpy(numpy.load(sys.argv[2])["tokens"])
kinds = {str(n.target).partition(".")[0] for n in program.graph.nodes if n.op == "call_function"}
heads = [n.meta["val"].shape for n in program.graph.nodes if n.name.startswith("past_keys")]
cache = tuple(torch.zeros(len(tokens), shape[1], 0, shape[3]) for shape in heads)
places = torch.arange(tokens.shape[1]).expand(tokens.shape)
with torch.no_grad():
    logits = run(tokens, places, cache, cache)[0]
numpy.save(sys.argv[3], logits.numpy())
print(",".join(sorted(kinds)))
"""


def test_it_runs_without_bitfold(artifact: Path, directory: Path, tmp_path: Path) -> None:
    """In a process that can import neither bitfold nor transformers: batches of two, operations of PyTorch alone."""
    import numpy as np

    probe = artifact / "verification.npz"
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(directory), str(probe), str(tmp_path / "out.npy")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(
        kind == "aten" or kind.startswith("<built-in") for kind in done.stdout.strip().split(",")
    )
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    tokens = torch.from_numpy(np.load(probe)["tokens"])
    with torch.no_grad():
        expected = load(artifact, device="cpu", dtype="float32")(tokens).logits
    assert distance(found, expected) < 1e-5


def test_an_artifact_is_itself(artifact: Path, directory: Path) -> None:
    result = verify_torch(directory)
    assert result.difference is not None
    assert result.difference < 2e-6
    assert result.tolerance == 1e-4
    expected = load(artifact, device="cpu", dtype="float32").generate(
        TOKENS[:1],
        attention_mask=torch.ones_like(TOKENS[:1]),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    generated = TorchProgram(directory).generate(TOKENS[0].tolist(), 8)
    assert generated == expected[0, TOKENS.shape[1] :].tolist()


def test_the_weights_lie_packed(directory: Path) -> None:
    tensors = json.loads((directory / "export.json").read_text())["tensors"]
    codes = [entry["length"] for name, entry in tensors.items() if name.endswith(".codes")]
    assert len(codes) == 42
    # With what the archive puts between them.
    assert sum(codes) < 4_718_592 / 2 + 42 * 512


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.codes", "model.norm.weight"])
def test_a_flipped_bit_is_named(directory: Path, tmp_path: Path, name: str) -> None:
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    place = json.loads((damaged / "export.json").read_text())["tensors"][name]
    flip(damaged / "model.pt2", place["offset"] + place["length"] - 1)
    with pytest.raises(VerificationError, match=f"{name} in .* is not what was written"):
        verify_torch(damaged)


def test_every_byte_is_seen(directory: Path, tmp_path: Path) -> None:
    tensors = json.loads((directory / "export.json").read_text())["tensors"].values()
    ends = sorted((entry["offset"], entry["offset"] + entry["length"]) for entry in tensors)
    assert ends[0][0] == 0
    assert ends[-1][1] == (directory / "model.pt2").stat().st_size
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    flip(damaged / "model.pt2", ends[-1][1] - 9)
    with pytest.raises(VerificationError, match=r"the graph in .* is not what was written"):
        verify_torch(damaged)


class _Danger:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('it ran')",))


def _with_members(directory: Path, out: Path, change: dict[str, bytes]) -> Path:
    """The archive with members, named behind its own name, that are others or new."""
    shutil.copytree(directory, out)
    with (
        zipfile.ZipFile(directory / "model.pt2") as old,
        zipfile.ZipFile(out / "model.pt2", "w") as new,
    ):
        top = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change.pop(name.partition("/")[2], None) or old.read(name))
        for name, content in change.items():
            new.writestr(f"{top}/{name}", content)
    return out


@pytest.mark.parametrize("key", ["expr_str", "target"])
def test_expressions_that_are_programs_are_refused(
    key: str, directory: Path, tmp_path: Path
) -> None:
    """torch.export.load evaluates them."""
    with zipfile.ZipFile(directory / "model.pt2") as archive:
        top = archive.namelist()[0].partition("/")[0]
        text = archive.read(f"{top}/models/model.json").decode()
    evil = "__import__('os').abort() or " if key == "expr_str" else "torch.os.abort"
    start = f'"{key}": "' if key == "expr_str" else '"target": "torch.ops.aten.'
    assert start in text
    changed = text.replace(start, f'"{key}": "{evil}', 1)
    out = _with_members(directory, tmp_path / "evil", {"models/model.json": changed.encode()})
    with pytest.raises(CheckpointError, match="holds the expression"):
        TorchProgram(out)


def test_pickles_are_refused_before_they_are_read(directory: Path, tmp_path: Path) -> None:
    """torch.export.load unpickles example inputs, tensors that say so, and other objects: it runs what they say."""
    stream = io.BytesIO()
    torch.save(_Danger(), stream)
    examples = _with_members(
        directory, tmp_path / "examples", {"data/sample_inputs/model.pt": stream.getvalue()}
    )
    with pytest.raises(SystemExit, match="it ran"):
        torch.export.load(examples / "model.pt2")
    with pytest.raises(CheckpointError, match=r"holds .*/sample_inputs/model.pt, which loading"):
        TorchProgram(examples)

    name = "data/weights/model_weights_config.json"
    with zipfile.ZipFile(directory / "model.pt2") as archive:
        top = archive.namelist()[0].partition("/")[0]
        content = json.loads(archive.read(f"{top}/{name}"))
    tensor, entry = next(iter(content["config"].items()))
    for other in content["config"].values():  # a tied weight has two names
        other["use_pickle"] = other["path_name"] == entry["path_name"]
    changed = {
        name: json.dumps(content).encode(),
        f"data/weights/{entry['path_name']}": stream.getvalue(),
    }
    weights = _with_members(directory, tmp_path / "weights", changed)
    with pytest.raises(SystemExit, match="it ran"):
        torch.export.load(weights / "model.pt2")
    with pytest.raises(CheckpointError, match=f"holds {tensor} as a pickle"):
        TorchProgram(weights)

    code = _with_members(directory, tmp_path / "code", {"data/aotinductor/model/a.so": b"code"})
    with pytest.raises(CheckpointError, match=r"holds .*a\.so, which loading could run"):
        TorchProgram(code)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(directory: Path, tmp_path: Path, kept: float) -> None:
    short = shutil.copytree(directory, tmp_path / "short")
    raw = (short / "model.pt2").read_bytes()
    (short / "model.pt2").write_bytes(raw[: int(kept * len(raw))])
    with pytest.raises(VerificationError, match="export it again"):
        verify_torch(short)
    with pytest.raises(CheckpointError, match=r"is no archive of torch.export .* export it again"):
        TorchProgram(short)


def test_what_it_cannot_say_is_refused(directory: Path, tmp_path: Path) -> None:
    model = quantized(tmp_path / "artifact", "w4a16kv8")
    with pytest.raises(ExportError, match="quantizes queries, keys or values"):
        export_to(model, "torch", tmp_path / "model")
    with pytest.raises(OutputError, match="is there already: add --overwrite"):
        export_to(model, "torch", directory)
    assert [file.name for file in tmp_path.iterdir()] == ["artifact"]
