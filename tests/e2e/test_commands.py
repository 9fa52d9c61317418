"""Every command as a user gives it, with and without --json, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import Outcome, Run

import bitfold
from bitfold.assets import CALIBRATION_TEXT, DEMO_MODEL, EVALUATION_TEXT
from bitfold.report import demo

AWQ = "--method awq --samples 4 --sequence-length 64"
LAYERS = 6 * 7


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(EVALUATION_TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def good(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def weights(artifact: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in artifact.glob("*.safetensors")}


# --- quantize ---


def test_quantize(run: Run, tmp_path: Path) -> None:
    shown = good(run(f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out")).out
    for word in (
        "q_proj",
        "4.156 bits",
        "from_pretrained",
        "vllm serve",
        "bitfold generate",
        "KL to the original",
    ):
        assert word in shown
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_default_method_is_auto_and_effort_is_heard(run: Run, tmp_path: Path) -> None:
    few = "--samples 2 --sequence-length 64"
    shown = good(run(f"quantize {DEMO_MODEL} -o {tmp_path}/out --effort low {few}"))
    assert "from_pretrained" in shown.out
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["method"] == "auto"
    assert [next(iter(part)) for part in recipe["transforms"]][-1] == "wush"
    assert next(iter(recipe["rounding"])) == "quantease"
    assert recipe.get("distillation") is None
    outcome = run(f"quantize {DEMO_MODEL} -o {tmp_path}/other --effort hihg {few}")
    assert outcome.code != 0
    assert "did you mean 'high'" in outcome.err
    assert not (tmp_path / "other").exists()


def test_quantize_in_json(run: Run, tmp_path: Path) -> None:
    outcome = good(run(f"quantize {DEMO_MODEL} -o {tmp_path}/out {AWQ} --json"))
    made = outcome.json
    assert made["out"] == f"{tmp_path}/out"
    assert made["seconds"] > 0
    assert made["resumed_blocks"] == 0
    assert made["peak_rss_mb"] > 100
    assert made["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 128)
    assert made["size_bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert len(made["layers"]) == LAYERS
    for layer in made["layers"]:
        assert layer["name"].startswith("model.layers.")
        assert layer["scheme"] == "w4a16g128"
        assert 0 < layer["relative_error"] < 0.2
    assert any("embedded" in note for note in made["notes"])
    assert "block 2 of 6" in outcome.err


def test_a_finished_artifact_is_left_alone(run: Run, artifact: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in artifact.iterdir()}
    line = f"quantize {DEMO_MODEL} --method rtn -o {artifact}"
    assert "is finished already: nothing was done" in good(run(line)).out
    made = good(run(f"{line} --json")).json
    assert made["finished_before"]
    assert made["resumed_blocks"] == 6
    assert len(made["layers"]) == LAYERS
    assert {file.name: file.stat().st_mtime_ns for file in artifact.iterdir()} == before


def test_overwrite(run: Run, artifact: Path) -> None:
    line = f"quantize {DEMO_MODEL} --method rtn -o {artifact} --scheme w8a16 --json"
    assert "--overwrite" in run(line).json["error"]
    made = good(run(f"{line} --overwrite")).json
    assert made["scheme"] == "w8a16"
    assert not made["finished_before"]
    assert [file.name for file in artifact.parent.iterdir()] == ["artifact"]
    good(run(f"verify {artifact}"))


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path) -> None:
    line = f"quantize {DEMO_MODEL} -o {tmp_path}/some/where/out {AWQ} --dry-run"
    shown = good(run(line)).out
    for word in ("42 layers in 6 blocks", "time", "memory", "disk", "Nothing was written"):
        assert word in shown
    estimate = good(run(f"{line} --json")).json
    assert estimate.keys() >= {"seconds", "peak_rss_mb", "size_bytes", "disk_bytes"}
    assert not list(tmp_path.iterdir())


def test_options_reach_the_recipe(run: Run, tmp_path: Path) -> None:
    line = f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out --scheme w4a8g32 --set weight.symmetric=true --seed 3"
    line += (
        " --set activation.static=true --set weight_range=mse --set mse.steps=4 --ignore *.k_proj"
    )
    made = good(
        run(f"{line} --samples 2 --sequence-length 32 --dtype float32 --device cpu --json")
    ).json
    assert len(made["layers"]) == LAYERS - 6
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["scheme"]["weight"]["symmetric"]
    assert recipe["scheme"]["activation"]["static"]
    assert recipe["weight_range"]["mse"]["steps"] == 4
    assert recipe["ignore"] == ["*.k_proj"]
    assert recipe["seed"] == 3
    good(run(f"verify {tmp_path}/out"))


def test_calibration_files_of_every_kind(run: Run, tmp_path: Path) -> None:
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")[:3000]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    line = f"quantize {DEMO_MODEL} -o {tmp_path}/out {AWQ} --calibration {tmp_path}/a.txt"
    made = good(run(f"{line} --calibration {tmp_path}/b.jsonl --json")).json
    assert made["notes"] == []
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["calibration"]["source"].startswith("a.txt, b.jsonl: 4 of")


def test_a_recipe_file_with_schemes_by_pattern(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "scheme: w4a16g128\n"
        "weight_range: {percentile: {p: 99.5}}\n"
        "ignore: ['*.layers.0.*']\n"
        "layers:\n"
        "- {match: '*.down_proj', scheme: w8a16}\n"
        "- {match: 'model.layers.5.*', scheme: w3a16g32}\n"
    )
    line = f"quantize {DEMO_MODEL} -o {tmp_path}/out --recipe {tmp_path}/recipe.yaml --json"
    layers = {layer["name"]: layer["scheme"] for layer in good(run(line)).json["layers"]}
    assert len(layers) == LAYERS - 7
    assert layers["model.layers.1.mlp.down_proj"] == "w8a16"
    assert layers["model.layers.5.mlp.down_proj"] == "w3a16g32"
    assert layers["model.layers.1.mlp.up_proj"] == "w4a16g128"
    good(run(f"verify {tmp_path}/out"))


def test_an_artifact_s_recipe_gives_the_same_weights(run: Run, tmp_path: Path) -> None:
    calibration = "--samples 4 --sequence-length 64"
    line = f"quantize {DEMO_MODEL} {calibration} --json"
    first = f"{line} -o {tmp_path}/one --method smoothquant+awq --scheme w3a16g64 --set awq.steps=4 --ignore *.v_proj"
    made = good(run(first)).json
    assert made["method"] == "smoothquant+awq"
    recipe = yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())
    assert [list(part) for part in recipe["transforms"]] == [["smoothquant"], ["awq"]]
    good(run(f"{line} -o {tmp_path}/two --recipe {tmp_path}/one/recipe.yaml"))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert (tmp_path / "one/recipe.yaml").read_bytes() == (
        tmp_path / "two/recipe.yaml"
    ).read_bytes()
    # A method given beside the file takes the place of the file's own parts.
    good(run(f"{line} -o {tmp_path}/three --recipe {tmp_path}/one/recipe.yaml --method rtn"))
    assert yaml.safe_load((tmp_path / "three" / "recipe.yaml").read_text())["transforms"] == []


# --- what reads an artifact ---


def test_eval(run: Run, artifact: Path, text: Path) -> None:
    line = f"eval {artifact} --text {text} --sequence-length 64 --against {DEMO_MODEL}"
    shown = good(run(line)).out
    for word in ("perplexity", "KL to the original", "top-1 agreement", "text"):
        assert word in shown
    outcome = good(run(f"{line} --json"))
    one = outcome.json
    assert one.keys() >= {"perplexity", "tokens", "windows", "sequence_length"}
    assert one.keys() >= {"kl_mean", "kl_median", "kl_p99", "kl_se", "top1_agreement", "top1_se"}
    assert one["tokens"] == one["windows"] * 63
    assert 0.001 < one["kl_mean"] < 0.2
    assert "evaluating" in outcome.err


def test_eval_of_several_texts(run: Run, text: Path) -> None:
    other = text.with_name("other.txt")
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    line = f"eval {DEMO_MODEL} --text {text} --text backwards={other} --sequence-length 64 --json"
    both = good(run(line)).json
    assert both.keys() == {"text", "backwards"}
    assert both["backwards"]["perplexity"] > 2 * both["text"]["perplexity"]
    assert "kl_mean" not in both["text"]


def test_eval_of_questions(run: Run, artifact: Path, tmp_path: Path) -> None:
    questions = [
        {"question": "The capital of France is", "choices": ["Paris", "of the"], "answer": "A"},
        {"question": "He was born in", "choices": ["xq zv", "the"], "answer": 1},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    line = f"eval {artifact} --tasks {path} --against {DEMO_MODEL}"
    shown = good(run(line)).out
    for word in ("mine", "acc_norm", "recovery", "same", "50.0%", "±"):
        assert word in shown
    outcome = good(run(f"{line} --limit 1 --json"))
    one = outcome.json
    assert one.keys() == {"tasks", "notes"}
    assert one["tasks"]["mine"]["questions"] == 1
    assert one["tasks"]["mine"].keys() >= {"acc", "acc_se", "original", "recovery", "same_answers"}
    assert "the original, mine" in outcome.err


def test_eval_by_a_file_of_logits(run: Run, artifact: Path, text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.kld"
    line = (
        f"eval {DEMO_MODEL} --text {text} --sequence-length 64 --limit 3 --kl-base {base} --write"
    )
    written = good(run(f"{line} --json")).json["written"]
    assert (written["windows"], written["sequence_length"]) == (3, 64)
    assert written["bytes"] == base.stat().st_size
    assert "is there already" in run(line).err
    shown = good(run(f"eval {artifact} --kl-base {base}")).out
    for word in ("KL to the original", "top-1 agreement", "ratio of the two", "3 of 64 tokens"):
        assert word in shown
    both = good(run(f"eval {artifact} --kl-base {base} --text {text} --limit 2 --json")).json
    assert both.keys() == {"texts", "kl_base"}
    assert both["kl_base"]["windows"] == both["texts"]["text"]["windows"] == 2
    assert 0.001 < both["kl_base"]["kl_mean"] < 0.2
    base.unlink()
    shown = good(run(line)).out
    assert "llama-perplexity -m MODEL.gguf -c 64" in shown


def test_verify(run: Run, artifact: Path) -> None:
    assert "verified" in good(run(f"verify {artifact}")).out
    checked = good(run(f"verify {artifact} --json")).json
    assert checked["ok"]
    assert checked["difference"] <= checked["tolerance"]
    assert checked["tensors"] > LAYERS


def test_inspect(run: Run, artifact: Path) -> None:
    original = good(run(f"inspect {DEMO_MODEL} --json")).json
    assert (original["kind"], original["family"], original["blocks"]) == ("original", "llama", 6)
    assert len(original["sites"]) == 5
    made = good(run(f"inspect {artifact} --json")).json
    assert made["kind"] == "bitfold artifact"
    assert made["scheme"] == "w4a16g128"
    assert made["provenance"]["source"]["model"] == str(DEMO_MODEL)
    assert "transforms: []" in made["recipe"]
    shown = good(run(f"inspect {artifact}")).out
    for word in ("llama", "w4a16g128", "NormSite", "recipe.yaml", "bits per weight"):
        assert word in shown


def test_generate(run: Run, artifact: Path) -> None:
    line = f'generate {artifact} --prompt "The history of" --max-new-tokens 8'
    shown = good(run(line)).out
    assert shown.startswith("The history of")
    assert "prompt tokens" in shown
    made = good(run(f"{line} --json")).json
    assert made["text"] in shown
    assert made["new_tokens"] == 8
    assert made["prompt_tokens"] > 1
    assert made["prefill_seconds"] > 0
    assert made["decode_tokens_per_second"] > 0
    assert made["peak_rss_mb"] > 100


def test_recipes(run: Run) -> None:
    methods = good(run("recipes --json")).json
    assert methods.keys() >= {"rtn", "smoothquant", "awq"}
    shown = good(run("recipes")).out
    for name, content in methods.items():
        assert name in shown
        assert content["summary"].split()[0] in shown
        full = good(run(f"recipes {name} --json")).json
        assert full["name"] == name
        assert full["method"] == name
        assert f"method: {name}" in good(run(f"recipes {name}")).out
    assert len(good(run("recipes smoothquant+awq --json")).json["transforms"]) == 2


def test_demo(
    run: Run,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "RUNS", [("rtn", "w4a16g128")])
    monkeypatch.setattr(demo, "EVALUATION_TEXT", text)
    rows = good(run(f"demo -o {tmp_path}/demo --json")).json["rows"]
    assert [row["method"] for row in rows] == ["original", "rtn"]
    assert rows[1]["kl_mean"] > 0
    assert rows[1]["sentence"]
    demo.print_demo(rows)
    shown = capsys.readouterr().out
    for word in ("ppl", "original", "rtn w4a16g128", "Try next", "bits/w"):
        assert word in shown


# --- beside the command line ---

LOADS_WITHOUT_BITFOLD = """
import sys
import numpy as np, torch
from transformers import AutoModelForCausalLM

artifact = sys.argv[1]
probe = np.load(f"{artifact}/verification.npz")
model = AutoModelForCausalLM.from_pretrained(artifact, dtype=getattr(torch, str(probe["dtype"])))
with torch.no_grad():
    logits = model(torch.from_numpy(probe["tokens"])).logits
logits = logits[:, probe["positions"]][..., probe["vocabulary"]].float().numpy()
assert not any(name.split(".")[0] == "bitfold" for name in sys.modules)
print(np.abs(logits - probe["logits"]).max() / probe["logits"].std())
"""


@pytest.mark.parametrize("scheme", ["w4a16g128", "w4a4q4kv4", "w8a8"])
def test_artifacts_load_where_bitfold_is_not(run: Run, tmp_path: Path, scheme: str) -> None:
    good(run(f"quantize {DEMO_MODEL} --method rtn -o {tmp_path}/out --scheme {scheme}"))
    script = [sys.executable, "-c", LOADS_WITHOUT_BITFOLD, str(tmp_path / "out")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1e-3


def test_the_module_is_the_command(run_process: Run) -> None:
    outcome = good(run_process("recipes rtn --json"))
    assert outcome.json["name"] == "rtn"
    assert outcome.err == ""


def test_the_python_api(tmp_path: Path, text: Path) -> None:
    """The examples of the package's docstring and of README."""
    out = tmp_path / "out"
    made = bitfold.quantize(
        DEMO_MODEL, out, method="rtn", scheme="w8a16", calibration=text, sequence_length=64
    )
    assert isinstance(made, bitfold.Quantization)
    assert made.bits_per_weight < 8.2
    figures = bitfold.evaluate(out, text, against=DEMO_MODEL, sequence_length=64)
    assert figures.to_json()["kl_mean"] < 0.01
    assert bitfold.verify(out).ok
    model = bitfold.load(out)
    tokenizer = bitfold.load_tokenizer(out)
    assert bitfold.generate(model, "The", tokenizer=tokenizer, max_new_tokens=2).new_tokens == 2
    recipe = bitfold.Recipe.make("rtn", "w8a16")
    again = bitfold.quantize(DEMO_MODEL, out, recipe=recipe, calibration=text, sequence_length=64)
    assert isinstance(again, bitfold.Quantization)
    assert again.finished_before
    with pytest.raises(bitfold.BitfoldError, match="one or the other"):
        bitfold.quantize(DEMO_MODEL, out, recipe=recipe, seed=1)
