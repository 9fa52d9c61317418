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
    assert verified["difference"] < 1e-5
    assert "leave --engine" in run(f"verify {out} --engine vllm").err
