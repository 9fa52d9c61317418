"""A model without weights that runs one block at a time.

The network is built by transformers on the meta device; weights are handed to each call and forgotten after it
(`torch.func.functional_call`), so that a block is an ordinary differentiable function of its weights, and nothing
of the model's code is rewritten.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PretrainedConfig

from bitfold.errors import CheckpointError, FamilyError
from bitfold.models import Family, family_of
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.config import read_config, said_of
from bitfold.runtime.attention import ATTENTION
from bitfold.runtime.online import running_online

__all__ = ["Skeleton"]

_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Buffers and duplicates that old checkpoints carry and no model needs.
_IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


class Skeleton:
    """The network of a checkpoint, held against its weights' names and shapes.

    Attributes: config, family, model (parameters on the meta device), blocks (the list of blocks),
    sources (parameter name → name in the checkpoint).
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = "cpu", *, untied: bool = False
    ) -> None:
        """Build the network, and hold the checkpoint against it.

        untied: lm_head is a tensor of its own, at first the embedding, even where the checkpoint ties the two.

        Raises FamilyError for an unknown architecture or one whose linear layers the family does not name,
        CheckpointError where config and weights contradict each other.
        """
        self.checkpoint = checkpoint
        self.config = _original_config(checkpoint)
        self.unties = untied and bool(self.config.tie_word_embeddings)
        if self.unties:
            self.config.tie_word_embeddings = False
        self.family: Family = family_of(self.config.model_type)
        self.device = torch.device(device)
        try:
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    self.config, attn_implementation=ATTENTION, dtype=torch.float32
                )
        except (
            Exception
        ) as error:  # a model's code may raise anything over a value that it did not expect
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'} describes no network that can be built ({said_of(error)}): "
                "copy or download it again."
            ) from error
        model.tie_weights()
        self.model = model.eval().requires_grad_(False)
        for name, buffer in list(self.model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, buffer.to(self.device))
        self.blocks: nn.ModuleList = self.model.get_submodule(self.family.blocks)
        self._check_linears()
        self.sources = self._match_weights()
        self._recorded: tuple[tuple[int, torch.dtype], list[dict[str, Any]]] | None = None

    # -- names -------------------------------------------------------------------------------------

    def block_name(self, index: int) -> str:
        """Full name of a block, as in the checkpoint's tensors."""
        return f"{self.family.blocks}.{index}"

    def block_parameters(self, index: int) -> list[str]:
        """Names of a block's parameters, relative to the block."""
        return [name for name, _ in self.blocks[index].named_parameters()]

    @property
    def outer_parameters(self) -> list[str]:
        """Full names of the parameters outside the blocks; a tied head counts once, as the embedding."""
        prefix = self.family.blocks + "."
        return [name for name, _ in self.model.named_parameters() if not name.startswith(prefix)]

    @property
    def ties_head(self) -> bool:
        """Whether lm_head and the embedding are one tensor."""
        return bool(self.config.tie_word_embeddings)

    # -- weights -----------------------------------------------------------------------------------

    def load_block(self, index: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """A block's weights by relative name, in `dtype` (as stored if None) on the skeleton's device."""
        prefix = self.block_name(index) + "."
        names = self.block_parameters(index)
        stored = self.checkpoint.read(
            [self.sources[prefix + name] for name in names], device=self.device, dtype=dtype
        )
        return {name: stored[self.sources[prefix + name]] for name in names}

    def load_outer(
        self, dtype: torch.dtype | None = None, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The weights outside the blocks by full name; only those named, if any are."""
        names = names or self.outer_parameters
        stored = self.checkpoint.read(
            [self.sources[name] for name in names], device=self.device, dtype=dtype
        )
        return {name: stored[self.sources[name]] for name in names}

    # -- running -----------------------------------------------------------------------------------

    def embed(self, outer: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """What the first block is given for tokens [batch, length]: [batch, length, hidden]."""
        with _Detour(self, final=None) as detour:
            self._call_base(outer, tokens)
        return detour.first

    def head(self, outer: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of what the last block gave, [batch, length, hidden]."""
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with _Detour(self, final=hidden):
            logits: Tensor = functional_call(
                self.model,
                dict(outer),
                (),
                {"input_ids": tokens, "use_cache": False},
                tie_weights=True,
            ).logits
        return logits

    def run(self, index: int, weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """Block `index` with these weights on hidden [batch, length, hidden]; differentiable.

        Maps among the weights (`NAME.online.…`) run at the modules that they name.
        """
        arguments = self._block_arguments(hidden.shape[1], hidden.dtype)[index]
        with running_online(self.blocks[index], weights) as parameters:
            output = functional_call(self.blocks[index], parameters, (hidden,), arguments)
        return output[0] if isinstance(output, tuple) else output

    def _call_base(self, outer: Mapping[str, Tensor], tokens: Tensor) -> None:
        prefix = self.model.base_model_prefix + "."
        base = {
            name.removeprefix(prefix): value
            for name, value in outer.items()
            if name.startswith(prefix)
        }
        functional_call(self.model.base_model, base, (), {"input_ids": tokens, "use_cache": False})

    def _block_arguments(self, length: int, dtype: torch.dtype) -> list[dict[str, Any]]:
        """What the model hands each block beside the hidden states: masks, rotary embedding, per layer.

        They depend on the length and dtype only, so they are recorded once by a pass that detours around the blocks.
        """
        key = (length, dtype)
        if self._recorded is None or self._recorded[0] != key:
            # The values do not matter: zeros that take no memory stand for the weights.
            zero = torch.zeros((), dtype=dtype, device=self.device)
            outer = set(self.outer_parameters)
            shapes = {n: p.shape for n, p in self.model.named_parameters() if n in outer}
            with torch.no_grad(), _Detour(self, final=None) as detour:
                self._call_base(
                    {name: zero.expand(shape) for name, shape in shapes.items()},
                    torch.zeros(1, length, dtype=torch.long, device=self.device),
                )
            self._recorded = (key, detour.arguments)
        return self._recorded[1]

    # -- checks ------------------------------------------------------------------------------------

    def _check_linears(self) -> None:
        for index, block in enumerate(self.blocks):
            found = {
                name for name, module in block.named_modules() if isinstance(module, nn.Linear)
            }
            if found != set(self.family.linears):
                odd = sorted(found.symmetric_difference(self.family.linears))
                raise FamilyError(
                    f"{self.block_name(index)} has linear layers that family '{self.family.name}' does not name, "
                    f"or lacks some that it names: {', '.join(odd)}. Correct the family in src/bitfold/models/."
                )

    def _twin(self, parameter: nn.Parameter) -> str | None:
        """The embedding's name for a head that the checkpoint ties to it and the skeleton does not."""
        if not self.unties or parameter is not self.model.get_output_embeddings().weight:
            return None
        embedding = self.model.get_input_embeddings().weight
        return next(name for name, other in self.model.named_parameters() if other is embedding)

    def _match_weights(self) -> dict[str, str]:
        """Hold the network's parameters against the checkpoint's tensors; returns the names' mapping."""
        prefix = self.model.base_model_prefix + "."
        sources: dict[str, str] = {}
        for name, parameter in self.model.named_parameters():
            wanted = self._twin(parameter) or name
            stored = wanted if wanted in self.checkpoint.tensors else wanted.removeprefix(prefix)
            if stored not in self.checkpoint.tensors:
                raise CheckpointError(
                    f"{self.checkpoint.path}: config.json asks for {name}, which the weights lack: "
                    "config and weights are of different models (layer count?); copy or download both again."
                )
            info = self.checkpoint.tensors[stored]
            if info.dtype not in _WEIGHT_DTYPES:
                dtype = str(info.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"The tensor {stored} in {self.checkpoint.path / info.file} is {dtype}, but "
                    "weights must be bfloat16, float16, float32 or float64: give the original checkpoint."
                )
            shape = info.shape
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self.checkpoint.path}: {name} is {list(shape)} in the weights but {list(parameter.shape)} "
                    "by config.json: config and weights are of different models; copy or download both again."
                )
            sources[name] = stored
        spare = set(self.checkpoint.tensors) - set(sources.values())
        if self.ties_head or self.unties:
            spare.discard("lm_head.weight")
        spare = {name for name in spare if not name.endswith(_IGNORED)}
        if spare:
            example = min(spare)
            raise CheckpointError(
                f"{self.checkpoint.path}: the weights hold {example} (and {len(spare) - 1} more) that config.json "
                "knows nothing of: config and weights are of different models (layer count?); "
                "copy or download both again."
            )
        return sources


class _Detour:
    """Within this context the model's blocks are replaced by ones that record their arguments and pass on."""

    def __init__(self, skeleton: Skeleton, final: Tensor | None) -> None:
        self._skeleton = skeleton
        self._final = final
        self.arguments: list[dict[str, Any]] = []
        self.first: Tensor = torch.empty(0)

    def __enter__(self) -> "_Detour":
        self._owner_name, _, self._leaf = self._skeleton.family.blocks.rpartition(".")
        owner = self._skeleton.model.get_submodule(self._owner_name)
        setattr(
            owner,
            self._leaf,
            nn.ModuleList(_PassOn(block, self) for block in self._skeleton.blocks),
        )
        return self

    def __exit__(self, *exception: object) -> None:
        owner = self._skeleton.model.get_submodule(self._owner_name)
        setattr(owner, self._leaf, self._skeleton.blocks)

    def passing(self, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        if not self.arguments:
            self.first = hidden
        self.arguments.append(arguments)
        return hidden if self._final is None else self._final


class _PassOn(nn.Module):
    """Stands where a block stood; answers for the attributes that the model's loop asks of a block."""

    def __init__(self, block: nn.Module, detour: _Detour) -> None:
        super().__init__()
        self._stand_in = [block]  # in a list, so that its (meta) parameters do not register
        self._detour = detour

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stand_in"][0], name)

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self._detour.passing(hidden, arguments)


def _original_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The config of a checkpoint that can be quantized: of a known family, and not quantized yet."""
    family_of(checkpoint.config["model_type"])
    if "quantization_config" in checkpoint.config:
        settings = checkpoint.config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{checkpoint.path} is quantized already (its quantization_config says {method}): "
            "give the original checkpoint."
        )
    return read_config(checkpoint)
