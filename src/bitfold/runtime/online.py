"""What nothing absorbs, and therefore runs: a block-diagonal matrix behind a module, as its child `online`.

The same product in the simulation (`running_online`) and in a loaded artifact (`attach`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bitfold.models.family import ONLINE
from bitfold.numerics import linear_blocks

__all__ = ["BlockDiagonal", "attach", "running_online"]

_SUFFIX = f".{ONLINE}.weight"


class BlockDiagonal(nn.Module):
    """A linear layer on rows x [..., count · size] whose weight is block-diagonal: x ↦ x Wᵀ; weight: W's blocks [count,
    size, size]."""

    def __init__(
        self,
        count: int,
        size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        blocks = torch.eye(size, dtype=dtype, device=device).repeat(count, 1, 1)
        self.weight = nn.Parameter(blocks, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., count · size], the same shape as x."""
        return linear_blocks(x, self.weight)


def attach(module: nn.Module, online: nn.Module) -> None:
    """Make a module hand its output through `online`, which becomes its child of that name."""
    module.add_module(ONLINE, online)
    module.register_forward_hook(_through_child)


@contextmanager
def running_online(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Within this context the modules `NAME` of a block run the matrices `NAME.online.weight` among its weights; gives
    the other weights."""
    with ExitStack() as stack:
        others = {}
        for name, value in weights.items():
            if name.endswith(_SUFFIX):
                module = block.get_submodule(name.removesuffix(_SUFFIX))
                stack.callback(module.register_forward_hook(_through(value)).remove)
            else:
                others[name] = value
        yield others


# Functions of the module they are given, so that copies of a model run their own matrices.
def _through_child(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = module.get_submodule(ONLINE)(output)
    return result


def _through(blocks: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return linear_blocks(output, blocks)

    return hook
