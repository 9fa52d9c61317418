"""The command line by itself: help, names, progress. What the commands do is in tests/e2e."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitfold.cli import app
from bitfold.errors import DataError
from bitfold.report.measuring import named_files
from bitfold.report.progress import showing_progress
from bitfold.version import VERSION

COMMANDS = (
    "quantize",
    "eval",
    "verify",
    "export",
    "import",
    "inspect",
    "recipes",
    "generate",
    "demo",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert f"Example: bitfold {command}" in shown
    assert "--json" in shown


def test_help_lists_every_command() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        shown = CliRunner().invoke(app, arguments).output
        assert all(command in shown for command in COMMANDS)


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.strip() == VERSION


def test_names_of_texts(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.write_text("x")
    assert named_files(["wiki=w.txt", "some/dir/news.txt", str(odd)]) == {
        "wiki": Path("w.txt"),
        "news": Path("some/dir/news.txt"),
        "a=b": odd,
    }
    with pytest.raises(DataError, match="Two texts are named 'w'"):
        named_files(["w.txt", "w=other.txt"])


def test_a_log_gets_a_line_for_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_progress("quantizing") as progress:
        for done in range(101):
            progress(done, 100, f"block [{done}]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"quantizing {done}%: block [{done}]" for done in range(0, 101, 10)]
