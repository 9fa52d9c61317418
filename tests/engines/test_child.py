"""Scripts in another Python: what they say, and that they never outlive who asked."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitfold.engines import child, vllm_child
from bitfold.engines.child import (
    has_module,
    resolve_python,
    run_script,
    say_shortly,
    talking,
)
from bitfold.errors import EngineError

PYTHON = Path(sys.executable)
CHILD = Path(vllm_child.__file__)


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    """A script of the given source."""

    def write(source: str) -> Path:
        file = tmp_path / "script.py"
        file.write_text(f"import json, os, subprocess, sys, time\n{source}")
        return file

    return write


def alive(process: int) -> bool:
    """Whether there is such a process that is more than its exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_steps_and_the_last_word(script: Callable[[str], Path], tmp_path: Path) -> None:
    steps: list[str] = []
    file = script(
        'for what in "one", "two": print(json.dumps({"doing": what}), flush=True)\n'
        'print("noise", file=sys.stderr)\n'
        'print(json.dumps({"done": sys.argv[1:]}), flush=True)\n'
    )
    said = run_script(PYTHON, file, ["a", tmp_path], tmp_path / "log", steps.append)
    assert said == {"done": ["a", str(tmp_path)]}
    assert steps == ["one", "two"]
    assert (tmp_path / "log").read_text() == "noise\n"


def test_a_death_without_a_word(script: Callable[[str], Path], tmp_path: Path) -> None:
    file = script('print("no memory left", file=sys.stderr); sys.exit(7)')
    with pytest.raises(EngineError, match=r"exit code 7 and no answer \(no memory left\)"):
        run_script(PYTHON, file, [], tmp_path / "log", print)


# Starts a child of its own, says both ids, and sleeps.
SLEEPS = """
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"doing": f"{os.getpid()} {other.pid}"}), flush=True)
time.sleep(60)
"""


def test_nothing_is_left_after_an_interrupt(script: Callable[[str], Path], tmp_path: Path) -> None:
    started: list[int] = []

    def interrupt(said: str) -> None:
        started.extend(map(int, said.split()))
        assert all(map(alive, started))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_script(PYTHON, script(SLEEPS), [], tmp_path / "log", interrupt)
    assert len(started) == 2
    wait_until(lambda: not any(map(alive, started)))


def test_nothing_is_left_after_the_parent_is_killed(
    script: Callable[[str], Path], tmp_path: Path
) -> None:
    """By what the vLLM script does when its stdin ends: no parent can clean up after SIGKILL."""
    watching = (
        f"import runpy, threading\nwatch = runpy.run_path({str(CHILD)!r})['_end_with_the_parent']\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
    )
    file = script(watching + SLEEPS)
    parent = (
        "import sys; from pathlib import Path; from bitfold.engines.child import run_script\n"
        "run_script(Path(sys.executable), Path(sys.argv[1]), [], Path(sys.argv[2]), lambda s: print(s, flush=True))"
    )
    source = str(Path(child.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", parent, str(file), str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": source},
    ) as process:
        assert process.stdout is not None
        started = [int(word) for word in process.stdout.readline().split()]
        assert len(started) == 2
        assert all(map(alive, started))
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, started)))


def test_our_paths_do_not_reach_the_script(
    script: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own directory neither: a vllm.py there would be taken for vLLM."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "ours"))
    file = script(
        'print(json.dumps({"done": [sys.path, os.environ.get("PYTHONPATH")]}), flush=True)'
    )
    path, variable = run_script(PYTHON, file, [], tmp_path / "log", print)["done"]
    assert str(tmp_path) not in path
    assert str(tmp_path / "ours") not in path
    assert variable is None


def test_the_vllm_script_says_what_failed(tmp_path: Path) -> None:
    """In a Python without vLLM: the real script, and a real error."""
    if has_module(PYTHON, "vllm"):
        pytest.skip("this Python has vLLM")
    (tmp_path / "request.json").write_text('{"model": "none", "dtype": "auto"}')
    import numpy as np

    np.savez(tmp_path / "tokens.npz", probe=np.zeros((1, 4), dtype=np.int64))
    steps: list[str] = []
    said = run_script(PYTHON, CHILD, [tmp_path], tmp_path / "log", steps.append)
    assert said == {"failed": "No module named 'vllm'"}
    assert steps == ["importing vLLM"]
    assert "Traceback" in (tmp_path / "log").read_text()


def test_pythons(tmp_path: Path) -> None:
    assert resolve_python(sys.executable) == PYTHON
    assert has_module(PYTHON, "json")
    assert not has_module(PYTHON, "there_is_no_such_module")
    with pytest.raises(EngineError, match=r"There is no program .*/nothing: give the python"):
        resolve_python(tmp_path / "nothing")
    with pytest.raises(EngineError, match="is no Python that works"):
        has_module(resolve_python("true"), "json")
    text = tmp_path / "text"
    text.write_text("no program")
    text.chmod(0o755)
    with pytest.raises(EngineError, match="does not run"):
        has_module(resolve_python(text), "json")


def test_what_libraries_say_becomes_a_part_of_a_sentence() -> None:
    assert say_shortly("No kernel.\n  Reasons: none.\n") == "No kernel. Reasons: none"
    assert len(say_shortly("word " * 1000)) <= 500


def test_questions_and_answers(script: Callable[[str], Path], tmp_path: Path) -> None:
    """In turn, until it ends by itself, which is said; and it is gone afterwards."""
    file = script(
        "for line in sys.stdin:\n"
        "    if line == 'end\\n': sys.exit('no more')\n"
        "    print(json.dumps({'twice': 2 * int(line), 'process': os.getpid()}), flush=True)\n"
    )
    with talking(PYTHON, file, [], tmp_path / "log") as (hear, send):
        for number in (3, 4):
            send(str(number))
            said = hear()
            assert said["twice"] == 2 * number
        assert alive(said["process"])
    assert not alive(said["process"])
    with talking(PYTHON, file, [], tmp_path / "log") as (hear, send):
        send("end")
        with pytest.raises(EngineError, match=r"exit code 1 and no answer \(no more\)"):
            hear()
        send("5")  # which nobody hears
