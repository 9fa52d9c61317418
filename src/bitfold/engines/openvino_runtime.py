"""OpenVINO in this process: a directory that `bitfold.export` wrote, on the CPU."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitfold.engines.stepwise import Stepwise
from bitfold.errors import CheckpointError, EngineError
from bitfold.export.openvino_graph import GRAPH_FILE
from bitfold.export.openvino_package import openvino_package

__all__ = ["OpenVino"]


class OpenVino(Stepwise):
    """A model of one sequence with its cache. Attributes: vocabulary."""

    def __init__(self, directory: Path, *, threads: int | None = None) -> None:
        """threads: those PyTorch uses, if None.

        Raises MissingExtraError without the package, CheckpointError for a graph that it does not load, EngineError
        where jemalloc is preloaded, with which it aborts (2026.4: "free(): invalid pointer").
        """
        if "jemalloc" in os.environ.get("LD_PRELOAD", ""):
            raise EngineError(
                "OpenVINO aborts where jemalloc stands in for malloc: take it out of LD_PRELOAD and run this again."
            )
        settings = {
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            # Where the processor has bfloat16, OpenVINO would compute in that.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        core = openvino_package().Core()
        try:
            model = core.read_model(directory / GRAPH_FILE)
            compiled = core.compile_model(model, "CPU", settings)
            self.vocabulary = int(compiled.output("logits").partial_shape[-1].get_length())
            self._request = compiled.create_infer_request()
        except RuntimeError as error:
            raise CheckpointError(
                f"OpenVINO does not load {directory} ({_last_line(error)}): it is damaged, or of another version; "
                "export it again."
            ) from error
        self.start()

    def start(self) -> None:
        """Forget all tokens."""
        self._request.reset_state()
        self._position = 0

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] behind each token, which go on from those before."""
        end = self._position + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self._position, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        try:
            self._request.infer(feeds, share_inputs=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"OpenVINO stopped at token {self._position} ({_last_line(error)}): give shorter windows, or "
                "export it again."
            ) from error
        self._position = end
        return torch.from_numpy(self._request.get_tensor("logits").data[0].copy())


def _last_line(error: Exception) -> str:
    """The first ones say where in its sources."""
    return str(error).strip().splitlines()[-1][:200]
