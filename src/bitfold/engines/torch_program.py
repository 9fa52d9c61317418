"""A graph of `torch.export` in this process: a directory that `bitfold.export` wrote, on the CPU."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from bitfold.engines.stepwise import Stepwise
from bitfold.errors import CheckpointError
from bitfold.export.torch_file import PROGRAM_FILE

__all__ = ["TorchProgram", "refuse_pickles"]

# What bitfold writes, behind the archive's own name: tensors as they lie in memory, JSON, and small texts.
_PLAIN = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|data/(weights|constants)/\w+_config\.json|models/model\.json|"
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_EXAMPLES = "data/sample_inputs/model.pt"


class TorchProgram(Stepwise):
    """A model of one sequence with its cache."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError for a file that holds pickles, or does not load."""
        file = directory / PROGRAM_FILE
        refuse_pickles(file)
        try:
            program = torch.export.load(file)
            self._run = program.module()
        except Exception as error:  # a damaged archive raises whatever its reader meets
            raise CheckpointError(
                f"PyTorch does not load {file} ({' '.join(str(error).split())[:200]}): it is damaged, or of another "
                "version; export it again."
            ) from error
        inputs = [x for x in program.graph_signature.user_inputs if "past_keys" in str(x)]
        places = {
            node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
        }
        _, heads, _, head_dim = places[str(inputs[0])].shape
        self._empty = tuple(torch.zeros(1, heads, 0, head_dim) for _ in inputs)
        self.start()

    def start(self) -> None:
        """Forget all tokens."""
        self._keys = self._values = self._empty
        self._position = 0

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] behind each token, which go on from those before."""
        end = self._position + len(tokens)
        places = torch.arange(self._position, end)[None]
        with torch.no_grad():
            logits, self._keys, self._values = self._run(
                torch.tensor([tokens]), places, self._keys, self._values
            )
        self._position = end
        found: Tensor = logits[0]
        return found


def refuse_pickles(file: Path) -> None:
    """Raises CheckpointError for an archive of which `torch.export.load` would unpickle something, or run machine code.

    It does the one for tensors that say `use_pickle`, objects that are no tensors, and example inputs; the other for
    what AOTInductor compiled (torch/export/pt2_archive/_package.py of 2.13).
    """
    try:
        with ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.partition("/")[2]
                if name == _EXAMPLES and info.file_size == 0:
                    continue
                if not _PLAIN.fullmatch(name):
                    raise CheckpointError(
                        f"{file} holds {info.filename}, which loading could run as a program and bitfold does not "
                        "write: export it again."
                    )
                if name == "models/model.json":
                    _refuse_expressions(json.loads(archive.read(info)), file)
                if not name.endswith("_config.json"):
                    continue
                for tensor, entry in json.loads(archive.read(info))["config"].items():
                    if entry["use_pickle"] or not re.fullmatch(
                        r"(weight|tensor)_\d+", entry["path_name"]
                    ):
                        raise CheckpointError(
                            f"{file} holds {tensor} as a pickle, which loading could run as a program and bitfold does "
                            "not write: export it again."
                        )
    except (OSError, BadZipFile, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no archive of torch.export ({error}): it is damaged; export it again."
        ) from error


# `torch.export.load` evaluates the sizes' expressions as Python, by sympy: these characters and names are all that it
# needs for sizes, and none of them leads to anything else.
_SYMBOL = re.compile(r"Symbol\('[su]\d+'(, \w+=True)*\)")
_EXPRESSION = re.compile(r"[A-Za-z0-9_+*/%(), <>=-]*")
_NAMES = re.compile(
    r"[su]\d+|Add|Mul|Pow|Integer|Max|Min|FloorDiv|Mod|PythonMod|CleanDiv|Eq|Ne|Ge|Le|int_oo|oo"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|higher_order)\.\w+(\.\w+)?|_operator\.(add|sub|mul|floordiv|mod|neg|getitem|eq|ge|gt|le|lt)"
)


def _refuse_expressions(content: Any, file: Path) -> None:
    """Raises CheckpointError for an expression in a graph that is more than arithmetic of sizes, and for calls of what
    is no operator."""
    waiting = [content]
    while waiting:
        here = waiting.pop()
        if isinstance(here, list):
            waiting += here
        if not isinstance(here, dict):
            continue
        waiting += here.values()
        for key in ("expr_str", "target"):
            said = here.get(key)
            if not isinstance(said, str) or (key == "target" and "inputs" not in here):
                continue
            sizes = _SYMBOL.sub("s0", said)
            plain = _EXPRESSION.fullmatch(sizes) and all(
                _NAMES.fullmatch(name) for name in re.findall(r"[A-Za-z_]\w*", sizes)
            )
            if not (plain if key == "expr_str" else _OPERATOR.fullmatch(said)):
                raise CheckpointError(
                    f"{file} holds the expression '{said[:80]}', which loading could run as a program and bitfold does "
                    "not write: export it again."
                )
