"""ExecuTorch or LiteRT in another Python, or in another process of this one: logits of a directory's model."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitfold.engines.child import has_module, resolve_python, say_shortly, talking
from bitfold.engines.stepwise import Stepwise
from bitfold.errors import EngineError
from bitfold.export.executorch_file import EXECUTORCH_FILE
from bitfold.export.litert_file import LITERT_FILE

__all__ = ["PHONE_FORMATS", "PhoneEngine", "PhoneFormat", "check_phone_python", "phone_engine"]

_CHILD = Path(__file__).with_name("phone_child.py")


@dataclass(frozen=True)
class PhoneFormat:
    """name: of the engine. file: in a directory. module: of Python."""

    name: str
    file: str
    module: str


PHONE_FORMATS: Mapping[str, PhoneFormat] = {
    "executorch": PhoneFormat("ExecuTorch", EXECUTORCH_FILE, "executorch"),
    "litert": PhoneFormat("LiteRT", LITERT_FILE, "ai_edge_litert"),
}


class PhoneEngine(Stepwise):
    """A model of one sequence with its cache.

    Attributes: version (of the engine), seconds (of the last answer), memory
    (bytes that its process took for the model at most)."""

    def __init__(self, ask: Callable[[Mapping[str, Any]], Mapping[str, Any]], place: Path) -> None:
        self._ask, self._place = ask, place
        self.version, self.seconds, self.memory = "", 0.0, 0
        self._before = 0
        self.start()

    def started(self, said: Mapping[str, Any]) -> None:
        """Take in what the script says at first."""
        self.version, self._before = said["version"], said["memory"]

    def start(self) -> None:
        """Forget all tokens."""
        self._position = 0

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] behind each token, which go on from those before. Raises EngineError."""
        np.save(self._place / "tokens.npy", np.array(tokens, dtype=np.int64))
        said = self._ask({"start": self._position})
        self.seconds = said["done"]["seconds"]
        self.memory = said["done"]["peak"] - self._before
        self._position += len(tokens)
        return torch.from_numpy(np.load(self._place / "logits.npy"))


def check_phone_python(format: str, python: str | Path | None) -> Path:
    """The path of a Python that has the engine of a format; None stands for this one. EngineError where it has not."""
    found = resolve_python(python or sys.executable)
    its = PHONE_FORMATS[format]
    if not has_module(found, its.module):
        raise EngineError(
            f"{python or 'This Python'} has no {its.name}: make an environment by scripts/make_phones_environment.sh "
            "DIRECTORY, and give --engine-python DIRECTORY/bin/python"
        )
    return found


@contextmanager
def phone_engine(directory: Path, format: str, python: Path) -> Iterator[PhoneEngine]:
    """Run a directory's model in the engine of its format, meanwhile.

    Raises EngineError where it does not run there.
    """
    its = PHONE_FORMATS[format]
    with tempfile.TemporaryDirectory(prefix="bitfold-phone-") as name:
        place = Path(name)
        arguments: list[str | Path] = [format, (directory / its.file).absolute(), place]
        with talking(python, _CHILD, arguments, place / "log") as (hear, send):

            def heard() -> Mapping[str, Any]:
                said = hear()
                if "failed" in said:
                    raise EngineError(
                        f"{directory} does not run in {its.name} ({say_shortly(said['failed'])}): export it again by "
                        "the version of the engine that it is to run in"
                    )
                return said

            def ask(content: Mapping[str, Any]) -> Mapping[str, Any]:
                send(json.dumps(content))
                return heard()

            engine = PhoneEngine(ask, place)
            engine.started(heard())
            yield engine
