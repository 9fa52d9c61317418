"""Where a training run stands, in one safetensors file, so that a killed run goes on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitfold.errors import OutputError

__all__ = ["LoopState", "read_state", "write_state"]

_VERSION = "1"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class LoopState:
    """step: steps done. losses, looks: of them so far. best, kept: the best state, and the step it is of."""

    step: int = 0
    kept: int = 0
    losses: list[float] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)


def write_state(
    file: Path,
    request: str,
    state: LoopState,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
) -> None:
    """Write all that a run needs to go on, whole or not at all. OutputError where that cannot be."""
    held = {f"now.{name}": tensor for name, tensor in tensors.items()}
    held |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        held |= {f"adam.{part}.{name}": value for part, value in moments.items()}
    # As copies: safetensors refuses tensors that share memory.
    held = {name: tensor.detach().cpu().clone() for name, tensor in held.items()}
    content = {key: value for key, value in vars(state).items() if key != "best"}
    metadata = {"version": _VERSION, "request": request, "state": json.dumps(content)}
    partial = file.with_name(f"{file.name}.partial")
    try:
        save_file(held, partial, metadata=metadata)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{file} cannot be written ({error}): make room, or choose another -o"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def read_state(
    file: Path,
    request: str,
    tensors: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
) -> LoopState:
    """Put what `write_state` wrote in place; a fresh state, and nothing changed, where there is none of this request,
    or it is damaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if (metadata.get("version"), metadata.get("request")) != (_VERSION, request):
                return LoopState()
            held = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        state = LoopState(**json.loads(metadata["state"]))
        state.looks = [(int(step), value) for step, value in state.looks]
        now = {name: held[f"now.{name}"] for name in tensors}
        state.best = {name: held[f"best.{name}"].to(t.device) for name, t in tensors.items()}
        moments = {
            name: {part: held[f"adam.{part}.{name}"] for part in _MOMENTS}
            for name in parameters
            if f"adam.step.{name}" in held
        }
        fits = all(now[name].shape == tensor.shape for name, tensor in tensors.items())
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return LoopState()
    if not fits:
        return LoopState()
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(now[name])
    for name, parts in moments.items():
        parameter = parameters[name]
        # AdamW counts its steps on the CPU.
        optimizer.state[parameter] = {
            part: value if part == "step" else value.to(parameter.device)
            for part, value in parts.items()
        }
    return state
