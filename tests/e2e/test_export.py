"""`bitfold export`, and `bitfold verify` of what it wrote, from the command line."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Run
from safetensors.torch import load_file

from bitfold.export.gptq import from_awq, from_gptq
from bitfold.export.reading import read_model
from bitfold.models.headers import read_json
from bitfold.numerics import QuantizedTensor
from bitfold.report.earlier_exports import earlier_export

NAME = "model.layers.3.mlp.down_proj"
ALREADY = "it was there already, made of this artifact"
# `bitfold`, killed as soon as it would begin a second export.
KILLED = """
import os, signal, sys
from bitfold.report import exports

whole, begun = exports.export_to, []

def export_to(*arguments, **options):
    begun.append(1)
    if len(begun) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **options)

exports.export_to = export_to
from bitfold.cli import main
main()
"""


def test_gguf_from_the_command_line(run: Run, artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    pytest.importorskip("xllamacpp", reason="the extra 'gguf' is not installed")
    file, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    made = run(f"export {artifact} --to gguf -o {file} --json").json
    assert made["bytes"] == file.stat().st_size
    again = run(f"export {artifact} --to gguf -o {file}")
    assert again.code == 1
    assert "is there already: add --overwrite" in again.err
    assert run(f"export {artifact} --to gguf -o {file} --overwrite").code == 0

    verified = run(f"verify {file} --json").json
    assert verified["engine"] == "llama.cpp"
    assert 0 < verified["difference"] < verified["tolerance"]
    text.write_text(
        "The history of the world is long, and most of it was never written down. " * 200
    )
    compared = run(f"verify {file} --against {artifact} --text {text} --json").json["text"]
    assert 0 < compared["kl_mean"] < 0.01
    ratio = compared["perplexity_engine"] / compared["perplexity_simulation"]
    assert abs(ratio - 1) < 0.02
    assert "give both, or neither" in run(f"verify {file} --text {text}").err
    assert "give both, or neither" in run(f"verify {file} --against {artifact}").err
    assert "leave --engine" in run(f"verify {file} --engine vllm").err


def test_gguf_there_and_back(run: Run, artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    file, back, text = tmp_path / "model.gguf", tmp_path / "back", tmp_path / "text.txt"
    assert run(f"export {artifact} --to gguf -o {file}").code == 0
    seen = run(f"inspect {file} --json").json
    assert (seen["kind"], seen["family"], seen["head"]) == ("GGUF file", "llama", "tied")
    assert (seen["blocks"], seen["vocabulary"], seen["written_by"]) == (6, 4096, "bitfold")
    assert seen["weights_by_type"]["Q5_0"] == 4_718_592
    assert sum(seen["bytes_by_dtype"].values()) < seen["size_bytes"] == file.stat().st_size
    assert seen["tokenizer"]["special"]["eos"] == "<|endoftext|>"
    assert "cut as gpt-2" in run(f"inspect {file}").out
    made = run(f"import {file} -o {back} --json").json
    assert "42 in Q5_0" in made["notes"][0]
    text.write_text("It was never written down, and nobody remembers who said it first. " * 200)
    found = run(f"eval {back} --text {text} --against {artifact} --limit 2 --json").json
    assert found["kl_mean"] < 1e-3
    assert run(f"inspect {back}").code == 0
    file.write_bytes(file.read_bytes()[:100_000])
    for command in (f"inspect {file}", f"import {file} -o {tmp_path / 'other'}"):
        assert "is truncated or damaged" in run(command).err


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_directories_hold_the_same_integers(
    run: Run, artifact: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / method
    assert run(f"export {artifact} --to {method} -o {out}").code == 0
    settings = read_json(out / "config.json")["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == (method, 4, 128)
    assert (out / "tokenizer.json").is_file()
    tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    assert "is no artifact of bitfold" in run(f"verify {out}").err
    original = read_model(artifact).read(f"{NAME}.weight")
    assert isinstance(original, QuantizedTensor)
    if method == "awq":
        found = from_awq(NAME, tensors, original.scheme)
    else:
        assert settings["checkpoint_format"] == "gptq_v2"
        found = from_gptq(NAME, tensors, original.scheme, less_one=False)
    assert torch.equal(found.codes, original.codes)
    assert torch.equal(found.dequantize(), original.dequantize())
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(tensors[embeddings], read_model(artifact).read(embeddings))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--to onxx", "There is no format 'onxx' to export to"),
        ("--to gptq -o /nowhere/at/all", "There is no directory /nowhere/at"),
    ],
)
def test_what_cannot_be(
    run: Run, artifact: Path, tmp_path: Path, arguments: str, sentence: str
) -> None:
    out = "" if "-o" in arguments else f"-o {tmp_path / 'out'}"
    found = run(f"export {artifact} {arguments} {out}")
    assert found.code == 1
    assert sentence in found.err
    assert not list(tmp_path.glob("*out*"))


def test_mixed_bits_are_refused_where_there_is_one_scheme(
    run: Run, model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "scheme: w4a16g32\nrounding: nearest\nlayers:\n- match: '*.down_proj'\n  scheme: w8a16\n"
    )
    made = run(f"quantize {model} -o {tmp_path / 'mixed'} --recipe {recipe}")
    assert made.code == 0, made.err
    found = run(f"export {tmp_path / 'mixed'} --to gptq -o {tmp_path / 'out'}")
    assert "have different schemes" in found.err
    assert not (tmp_path / "out").exists()


def test_what_was_exported_comes_back(run: Run, artifact: Path, tmp_path: Path) -> None:
    assert run(f"export {artifact} --to awq -o {tmp_path / 'awq'}").code == 0
    made = run(f"import {tmp_path / 'awq'} -o {tmp_path / 'back'} --json")
    assert made.json["format"] == "bitfold"
    name = f"{NAME}.weight"
    back, original = read_model(tmp_path / "back").read(name), read_model(artifact).read(name)
    assert isinstance(back, QuantizedTensor)
    assert isinstance(original, QuantizedTensor)
    assert torch.equal(back.dequantize(), original.dequantize())
    assert run(f"inspect {tmp_path / 'back'}").code == 0
    assert "is there already" in run(f"import {tmp_path / 'awq'} -o {tmp_path / 'back'}").err


def test_quantized_and_exported_in_one_go(run: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    command = f"quantize {model} -o {tmp_path}/w4 --method rtn --to gguf,gptq"
    made = run(f"{command} --json").json
    assert [one["path"] for one in made["exports"]] == [
        f"{tmp_path}/w4.gguf",
        f"{tmp_path}/w4-gptq",
    ]
    assert all(Path(one["path"]).exists() for one in made["exports"])
    assert made["scheme"] == "w4a16g32"
    before = (tmp_path / "w4.gguf").read_bytes()
    again = run(f"{command} --json").json
    assert again["finished_before"]
    assert [one["notes"] for one in again["exports"]] == [[ALREADY], [ALREADY]]
    assert run(f"{command} --overwrite").code == 0
    assert (tmp_path / "w4.gguf").read_bytes() == before
    assert "did you mean 'gguf'" in run(f"quantize {model} -o {tmp_path}/x --to ggufs").err
    refused = run(f"quantize {model} -o {tmp_path}/x --method rtn --scheme w3a16 --for awq")
    assert refused.code == 1
    assert "would not fit awq" in refused.err
    assert not (tmp_path / "x").exists()
    asked = run(
        f"quantize {model} -o {tmp_path}/x --method rtn --scheme w4a8 --for vllm,gguf --dry-run"
    )
    assert "set weight.symmetric=true" in asked.err
    asked = run(
        f"quantize {model} -o {tmp_path}/x --method rtn --scheme w3a16 --for vllm --dry-run"
    )
    assert "no kernel on CPUs" in asked.out


@pytest.mark.parametrize("to", ["gguf,gptq", "onnx,awq"])
def test_a_run_that_is_killed_between_two_exports_goes_on(
    run: Run, model: Path, tmp_path: Path, to: str
) -> None:
    """With the exports that it finished, untouched; the others are made."""
    for format in to.split(","):
        if format not in ("gptq", "awq", "torch"):
            pytest.importorskip(format, reason=f"the extra '{format}' is not installed")
    command = f"quantize {model} -o {tmp_path}/w4 --method rtn --scheme w4a16g32 --to {to} --json"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *shlex.split(command)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    first, *others = to.split(",")
    done = tmp_path / ("w4.gguf" if first == "gguf" else f"w4-{first}")
    files = [done] if done.is_file() else sorted(done.iterdir())
    before = [(file.name, file.stat().st_mtime_ns) for file in files]
    made = run(command).json
    assert made["finished_before"]
    assert [one["format"] for one in made["exports"]] == [first, *others]
    assert made["exports"][0]["notes"] == [ALREADY]
    assert made["exports"][0]["bytes"] == sum(file.stat().st_size for file in files)
    assert not [one for one in made["exports"][1:] if ALREADY in one["notes"]]
    assert [(file.name, file.stat().st_mtime_ns) for file in files] == before
    assert all((tmp_path / f"w4-{name}").is_dir() for name in others)


def test_what_is_no_whole_export_of_the_artifact_is_not_taken_for_one(
    run: Run, artifact: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artifact-gptq"
    other = tmp_path / "other"
    assert run(f"quantize {model} -o {other} --method rtn --scheme w4a16g32").code == 0
    assert run(f"export {other} --to gptq -o {out}").code == 0
    assert earlier_export(other, "gptq", out) is not None
    assert earlier_export(artifact, "gptq", out) is None  # of another artifact
    refused = run(f"quantize {model} -o {artifact} --method rtn --to gptq")
    assert "artifact-gptq is there already: add --overwrite" in refused.err
    assert earlier_export(other, "awq", out) is None
    assert earlier_export(other, "gguf", out) is None
    (out / "model-00002-of-00007.safetensors").unlink()
    assert earlier_export(other, "gptq", out) is None
    graph = tmp_path / "graph"
    assert run(f"export {other} --to torch -o {graph}").code == 0
    assert earlier_export(other, "torch", graph) is not None
    assert earlier_export(other, "onnx", graph) is None
    with (graph / "model.pt2").open("ab") as stream:
        stream.write(b"more")
    assert earlier_export(other, "torch", graph) is None
    assert earlier_export(other, "torch", tmp_path / "nothing") is None
