"""ONNX Runtime in this process: a directory that `bitfold.export` wrote, on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfold.engines.stepwise import Stepwise
from bitfold.errors import CheckpointError, MissingExtraError

__all__ = ["OnnxRuntime"]

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntime(Stepwise):
    """A model of one sequence with its cache. Attributes: vocabulary."""

    def __init__(self, directory: Path, *, threads: int | None = None) -> None:
        """threads: those PyTorch uses, if None.

        Raises MissingExtraError without the package, CheckpointError for a graph that it does not load.
        """
        runtime = _package()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong is raised
        # Processors without VNNI add two products of 8 by 8 bits in 16, which may saturate: here they may not.
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._failures = _failures(runtime)
        try:
            self._session = runtime.InferenceSession(
                str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except self._failures as error:
            raise CheckpointError(
                f"ONNX Runtime does not load {directory} ({_first_line(error)}): it is damaged, or of another "
                "version; export it again."
            ) from error
        self._empty = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), dtype=_DTYPES[entry.type])
            for entry in self._session.get_inputs()
            if entry.name.startswith("past_key_values.")
        }
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        self.vocabulary = int(self._session.get_outputs()[0].shape[-1])
        self.start()

    def start(self) -> None:
        """Forget all tokens."""
        self._cache: dict[str, NDArray[Any]] = self._empty
        self._position = 0

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] behind each token, which go on from those before."""
        end = self._position + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self._position, end, dtype=np.int64)[None],
        }
        try:
            found = self._session.run(self._outputs, feeds | self._cache)
        except self._failures as error:
            raise CheckpointError(
                f"ONNX Runtime stopped at token {self._position} ({_first_line(error)}): give shorter windows, and "
                "token ids of the model's vocabulary."
            ) from error
        self._cache = {
            name.replace("present.", "past_key_values."): value
            for name, value in zip(self._outputs[1:], found[1:], strict=True)
        }
        self._position = end
        return torch.from_numpy(found[0][0])


def _package() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError(
            "ONNX Runtime is not installed, which runs ONNX files: pip install -c constraints.txt '.[onnx]'."
        ) from error
    return onnxruntime


def _failures(runtime: Any) -> tuple[type[Exception], ...]:
    """The errors of its C++ part have no base of their own."""
    state = runtime.capi.onnxruntime_pybind11_state
    names = [name for name in dir(state) if isinstance(getattr(state, name), type)]
    kinds = [getattr(state, name) for name in names]
    return (RuntimeError, *(kind for kind in kinds if issubclass(kind, Exception)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
