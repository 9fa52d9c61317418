"""What a run leaves behind when it stops, and what the next one makes of it; tests/e2e kill whole runs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitfold.errors import OutputError
from bitfold.pipeline.workdir import Workdir, finished_request, refuse_foreign

REQUEST = "1234"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model"


def work(out: Path, blocks: int, request: str = REQUEST) -> None:
    """A run that stops after so many blocks."""
    workdir = Workdir(out)
    with workdir.opened(request):
        for index in range(blocks):
            workdir.write_tensors(f"{index}.safetensors", {"x": torch.tensor([float(index)])})
            workdir.finish_block({"shard": f"{index}.safetensors"}, save_number(index))


def save_number(number: int) -> Callable[[Path], object]:
    return lambda file: file.write_text(str(number))


def found(out: Path, request: str = REQUEST) -> tuple[int, str | None]:
    """How many blocks the next run finds, and its streams."""
    workdir = Workdir(out)
    with workdir.opened(request):
        streams = workdir.streams
        return len(workdir.blocks), streams.read_text() if streams.exists() else None


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_finished_blocks_are_found_with_their_streams(blocks: int, out: Path) -> None:
    work(out, blocks)
    assert found(out) == (blocks, str(blocks - 1) if blocks else None)
    assert len(list(Workdir(out).root.glob("streams-*"))) == (1 if blocks else 0)
    assert not out.exists()


def test_another_request_finds_nothing(out: Path) -> None:
    work(out, 2)
    assert found(out, "5678") == (0, None)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"blocks": [1]}', "null", "\x00\xff"])
def test_a_damaged_state_is_none(content: str, out: Path) -> None:
    work(out, 2)
    (Workdir(out).root / "state.json").write_text(content, encoding="latin-1")
    assert found(out) == (0, None)


def test_a_kill_between_streams_and_state(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The streams after the block must not be taken for those before it."""
    work(out, 1)
    dumps = json.dumps

    def killed(*args: object, **options: object) -> str:
        raise KeyboardInterrupt

    workdir = Workdir(out)
    monkeypatch.setattr(json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt), workdir.opened(REQUEST):
        workdir.finish_block({"shard": "1.safetensors"}, save_number(1))
    monkeypatch.setattr(json, "dumps", dumps)
    assert found(out) == (1, "0")


def test_a_file_is_whole_or_not_there(out: Path) -> None:
    workdir = Workdir(out)

    def half(file: Path) -> None:
        file.write_text("half of")
        raise KeyboardInterrupt

    with workdir.opened(REQUEST):
        with pytest.raises(KeyboardInterrupt):
            workdir.finish_block({}, half)
        assert not workdir.streams.exists()
        workdir.write_text("config.json", "old")
        with pytest.raises(UnicodeEncodeError):
            workdir.write_text("config.json", "new \ud800")
        assert (workdir.path / "config.json").read_text() == "old"
    assert not list(Workdir(out).root.glob("writing*"))


def test_restart_forgets_everything(out: Path) -> None:
    work(out, 2)
    workdir = Workdir(out)
    with workdir.opened(REQUEST):
        workdir.restart()
        assert not workdir.blocks
        assert list(workdir.path.iterdir()) == []
    assert found(out) == (0, None)


def test_two_runs_do_not_meet(out: Path) -> None:
    first, second = Workdir(out), Workdir(out)
    with first.opened(REQUEST):
        with pytest.raises(OutputError, match="Another bitfold run"), second.opened(REQUEST):
            pass
        first.finish_block({"shard": "x"}, save_number(0))
    assert found(out) == (1, "0")


def publish(out: Path, request: str) -> None:
    workdir = Workdir(out)
    with workdir.opened(request):
        workdir.write_text("provenance.json", json.dumps({"bitfold": {"request": request}}))
        workdir.publish()


def test_publish(out: Path) -> None:
    work(out, 1)
    publish(out, REQUEST)
    assert {file.name for file in out.iterdir()} == {"0.safetensors", "provenance.json"}
    assert finished_request(out) == REQUEST
    assert not Workdir(out).root.exists()
    publish(out, "5678")  # in place of the old one
    assert finished_request(out) == "5678"
    assert {file.name for file in out.iterdir()} == {"provenance.json"}


def test_what_bitfold_did_not_make_is_refused(out: Path) -> None:
    refuse_foreign(out)
    out.mkdir()
    with pytest.raises(OutputError, match="not made by bitfold"):
        refuse_foreign(out)
    (out / "provenance.json").write_text(json.dumps({"bitfold": {"request": REQUEST}}))
    refuse_foreign(out)
    file = out / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="no directory"):
        refuse_foreign(file)
    with pytest.raises(OutputError, match="no directory"):
        refuse_foreign(file / "below")
