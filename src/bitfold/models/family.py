"""A model family as data: where its blocks are, and the sites where an invertible matrix may stand.

A *site* names modules relative to the block. What may be inserted there (the group) and how it is folded is in
`transforms/`; the same table serves every transform. DESIGN section 3 gives the mathematics of each kind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

__all__ = [
    "ONLINE",
    "Family",
    "FcPair",
    "NormSite",
    "QueryKey",
    "Site",
    "Stream",
    "UpDown",
    "ValueOutput",
    "head_counts",
]


ONLINE = "online"
"""What stands at a module and runs, since nothing absorbs it, is a module of its own under this name."""


@dataclass(frozen=True)
class NormSite:
    """norm → readers. `offset` is what the module adds to its stored gain (Gemma: 1)."""

    norm: str
    readers: tuple[str, ...]
    offset: float = 0.0

    @property
    def name(self) -> str:
        """As people call it, in reports and errors."""
        return f"{self.norm} -> {', '.join(reader.rpartition('.')[2] for reader in self.readers)}"

    @property
    def runs_at(self) -> str:
        """The module at which stands what nothing absorbs: behind the norm."""
        return self.norm

    @property
    def online(self) -> str:
        """The name among a block's weights of what runs behind the norm, where that is a matrix: a linear layer's
        weight."""
        return f"{self.norm}.{ONLINE}.weight"


@dataclass(frozen=True)
class ValueOutput:
    """v_proj → o_proj, per KV head."""

    value: str
    output: str

    @property
    def name(self) -> str:
        """As people call it."""
        return f"{self.value} -> {self.output}"

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.output,)

    @property
    def runs_at(self) -> str:
        """The module at which stands what nothing absorbs: before the reader."""
        return self.output


@dataclass(frozen=True)
class UpDown:
    """up_proj → down_proj of a gated MLP: act(gate) ⊙ up is linear in up."""

    up: str
    down: str
    gate: str

    @property
    def name(self) -> str:
        """As people call it."""
        return f"{self.up} -> {self.down}"

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.down,)

    @property
    def runs_at(self) -> str:
        """The module at which stands what nothing absorbs: before the reader."""
        return self.down


@dataclass(frozen=True)
class FcPair:
    """fc1 → activation → fc2; a diagonal passes only where the activation is positively homogeneous (ReLU)."""

    fc1: str
    fc2: str
    homogeneous: bool

    @property
    def name(self) -> str:
        """As people call it."""
        return f"{self.fc1} -> {self.fc2}"

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.fc2,)

    @property
    def runs_at(self) -> str:
        """The module at which stands what nothing absorbs: before the reader."""
        return self.fc2


@dataclass(frozen=True)
class QueryKey:
    """q_proj · k_proj, per KV head; what commutes depends on what stands between them and the dot product."""

    query: str
    key: str
    rotary: Literal["none", "half-split"]
    query_norm: str | None = None
    key_norm: str | None = None
    norm_offset: float = 0.0

    @property
    def name(self) -> str:
        """As people call it."""
        return f"{self.query} . {self.key}"

    @property
    def readers(self) -> tuple[str, ...]:
        """Nothing linear: the attention itself."""
        return ()

    @property
    def runs_at(self) -> str:
        """The module at which stands what nothing absorbs: the attention, on queries and keys as they meet."""
        return self.query.rpartition(".")[0]


Site = NormSite | ValueOutput | UpDown | FcPair | QueryKey


@dataclass(frozen=True)
class Stream:
    """The residual stream of a whole model: who writes it and who reads it, by full name, or relative to a block.

    embeddings: tables whose rows are added to it. writers: linear layers outside the blocks that write it.
    block_writers, block_norms: in a block. final_norm: before the reader outside the blocks. reads_mean: the norms are
    LayerNorms, which subtract the mean.
    """

    embeddings: tuple[str, ...]
    block_writers: tuple[str, ...]
    final_norm: str
    reader: str
    writers: tuple[str, ...] = ()
    reads_mean: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture.

    name:      as in config.json's `model_type`.
    blocks:    path of the list of blocks in the causal language model.
    attention: path of the attention module in a block.
    sites:     the block's sites, given the config (switches such as OPT's `do_layer_norm_before` close some).
    inputs:    linear layers that read the same tensor, first the one whose name stands for the input.
    stream:    the residual stream, given the config; None where its site is closed (post-norms).
    flattened_inputs: linear layers that are given [batch·tokens, in] instead of [batch, tokens, in].
    """

    name: str
    blocks: str
    attention: str
    sites: Callable[[PretrainedConfig], tuple[Site, ...]]
    inputs: tuple[tuple[str, ...], ...]
    stream: Callable[[PretrainedConfig], Stream | None] = lambda config: None
    flattened_inputs: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block."""
        return tuple(name for shared in self.inputs for name in shared)

    def measured_at(self, site: Site) -> str:
        """The name that stands for the input whose statistics describe a site: its readers', or q and k's."""
        return self.input_of(site.readers[0] if site.readers else site.query)  # type: ignore[union-attr]

    def input_of(self, linear: str) -> str:
        """The name that stands for the input of a linear layer."""
        return next(shared[0] for shared in self.inputs if linear in shared)


def head_counts(config: PretrainedConfig) -> tuple[int, int, int]:
    """(query heads, KV heads, head_dim) of a config."""
    settings: Any = config
    heads = settings.num_attention_heads
    kv_heads = getattr(settings, "num_key_value_heads", None) or heads
    head_dim = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    return heads, kv_heads, head_dim
