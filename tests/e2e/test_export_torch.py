"""`bitfold export --to torch`, and `bitfold verify` of what it wrote, from the command line."""

from pathlib import Path

from commands import Run


def test_torch_from_the_command_line(run: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    made = run(f"export {artifact} --to torch -o {out} --json").json
    assert made["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    again = run(f"export {artifact} --to torch -o {out}")
    assert again.code == 1
    assert "is there already: add --overwrite" in again.err
    verified = run(f"verify {out} --json").json
    assert verified["engine"] == "torch.export"
    seen = run(f"inspect {out} --json").json
    assert (seen["kind"], seen["format"]) == ("exported for torch.export", "torch")
    assert (seen["family"], seen["blocks"], seen["recorded"]) == ("llama", 6, True)
    assert seen["size_bytes"] == made["bytes"]
    shown = " ".join(run(f"inspect {out}").out.split())
    for words in ("exported for torch.export", "6 of width", "4,096"):
        assert words in shown
    for command in (f"generate {out} --prompt A", f"eval {out} --text {out}/config.json"):
        refused = run(command)
        assert refused.code == 1
        for words in ("is an export in the format torch", "`bitfold verify` of it runs it"):
            assert words in " ".join(refused.err.split())
    sums = (out / "export.json").read_text()
    (out / "export.json").write_text("{}")
    assert "export.json is damaged" in run(f"inspect {out}").err
    (out / "export.json").write_text(sums)
    assert verified["difference"] < 1e-5
    assert "leave --engine" in run(f"verify {out} --engine vllm").err
