"""What is quantized how: the grid and granularity of one tensor, and the papers' notation for a layer."""

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bitfold.errors import RecipeError
from bitfold.numerics.codebook import CodebookShape

__all__ = ["GridName", "Scheme", "TensorScheme"]

GridName = Literal["int", "shifted", "fp8_e4m3", "nf4", "mxfp4", "nvfp4", "codebook"]
Granularity = Literal["tensor", "head", "channel", "group", "token", "cluster"]

_FIXED_BITS = {"fp8_e4m3": 8, "nf4": 4, "mxfp4": 4, "nvfp4": 4}
# Grids whose definition says how many consecutive inputs share a scale.
_FIXED_GROUPS = {"mxfp4": 32, "nvfp4": 16}


class TensorScheme(BaseModel):
    """Grid and granularity of one kind of tensor.

    `granularity` names the elements that share one scale: all of them (`tensor`), a row of a weight
    (`channel`), `group_size` consecutive inputs of a row (`group`), or the last axis of an activation
    (`token`), or a cluster of an activation's channels (`cluster`): static, of all tokens, or of each token by itself.
    For queries, keys and values, [batch, head, token, head_dim], a scale is

    token    of a token and head; `group`: of `group_size` adjacent dimensions of a token and head. Dynamic.
    channel  of a head and dimension: static, the same for all tokens; or of keys, with `group_size`, found for that
             many consecutive tokens at once (KIVI, arXiv 2402.02750). The newest tokens, too few for a group, are
             left as they are: `runtime/attention.py` says what each query sees.
    head     of a head of a layer; `tensor`: of a layer. Static.

    The grids `mxfp4` and `nvfp4` have groups of 32 and 16. `shifted`: of imported and trained weights alone, integers
    from 0 times a scale, plus a number of the group's own, where `int` has zero-points that are integers; of one bit
    it is ± a scale. `codebook`: the size of a
    learned one, once it is known; `bits` are then those that were asked for. `clipped`: an activation's dynamic range
    is a share of its min-max, found on calibration text. `kept`: how many columns of a weight stand beside the codes in
    the dtype of the scales. `scales`: the precision of a weight's, beside the dtype of the checkpoint in which they are
    stored: such as half precision has too, or as llama.cpp's K types can say (`numerics/stored_scale.py`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid: GridName = "int"
    bits: int = Field(default=8, ge=1, le=8)
    symmetric: bool = True
    narrow: bool = False
    granularity: Granularity = "channel"
    group_size: int | None = Field(default=None, ge=2)
    clusters: int | None = Field(default=None, ge=2, le=256)
    static: bool = False
    clipped: bool = False
    codebook: CodebookShape | None = None
    kept: int = Field(default=0, ge=0)
    scales: Literal["storage", "half", "blocks"] = "storage"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits == 1 and self.grid != "shifted":
            raise ValueError("one bit has no integers on both sides of 0: choose 2 bits or more")
        if self.bits != _FIXED_BITS.get(self.grid, self.bits):
            raise ValueError(f"grid {self.grid} has {_FIXED_BITS[self.grid]} bits, not {self.bits}")
        if self.grid != "int" and not self.symmetric:
            raise ValueError(f"grid {self.grid} has no zero-point: set symmetric=true")
        if self.narrow and not (self.grid == "int" and self.symmetric):
            raise ValueError("narrow=true belongs to symmetric integer grids")
        if self.fp4 and self.static:
            raise ValueError(f"grid {self.grid} finds a group's scale as it runs: leave out static")
        if self.granularity == "group" and self.group_size is None:
            raise ValueError("granularity=group needs a group_size")
        if self.group_size is not None and self.granularity not in ("group", "channel"):
            raise ValueError(
                "group_size goes with granularity=group, or channel where tokens are grouped, and only with them"
            )
        size = _FIXED_GROUPS.get(self.grid, self.group_size)
        if self.group_size != size or (self.fp4 and self.granularity != "group"):
            raise ValueError(
                f"grid {self.grid} has one scale for every {size} inputs: set granularity=group and group_size={size}"
            )
        if (self.granularity == "cluster") != (self.clusters is not None):
            raise ValueError("clusters goes with granularity=cluster, and only with it")
        if self.clipped and (self.fp4 or self.static or self.clusters is not None):
            raise ValueError(
                "clipped shrinks the range that a token's values have as they come, without static, clusters or fp4 "
                "grids: set clipped=false"
            )
        if self.granularity == "token" and self.static:
            raise ValueError("a scale per token is dynamic: set granularity=tensor for static=true")
        if self.scales != "storage" and self.fp4:
            raise ValueError(f"grid {self.grid} has scales of its own: leave out scales")
        sizes = (self.grid, self.symmetric, self.bits in (2, 3, 6), self.group_size)
        if self.scales == "blocks" and sizes != ("int", True, True, 16):
            raise ValueError(
                "scales=blocks belongs to symmetric integers of 2, 3 or 6 bits in groups of 16: set symmetric=true and "
                "group_size=16, or scales=half"
            )
        if self.codebook is not None and self.grid != "codebook":
            raise ValueError("codebook goes with grid=codebook, and only with it")
        return self

    @property
    def code_bits(self) -> int:
        """Bits of a stored code."""
        return self.bits if self.codebook is None else self.codebook.code_bits

    @property
    def values_per_code(self) -> int:
        """How many adjacent values of a row one code stands for."""
        return 1 if self.codebook is None else self.codebook.dim

    @property
    def qmin(self) -> int:
        """Smallest integer code; 1 above it where the grid is narrow."""
        return -(2 ** (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """Largest integer code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def fp4(self) -> bool:
        """Whether the grid is of 4-bit floating point numbers, `mxfp4` or `nvfp4` (`numerics/fp4.py`)."""
        return self.grid in _FIXED_GROUPS

    @property
    def groups_tokens(self) -> bool:
        """Whether a scale is found for `group_size` consecutive tokens of a channel at once."""
        return self.granularity == "channel" and self.group_size is not None

    @property
    def calibrated(self) -> bool:
        """Whether an activation needs something of calibration text: its range or a share of it, its clusters, or the
        global scale of nvfp4."""
        return self.static or self.clipped or self.grid == "nvfp4" or self.clusters is not None

    def describe(self) -> str:
        """A few words for a table.

        >>> TensorScheme(bits=4, symmetric=False, granularity="group", group_size=128).describe()
        'int4 asymmetric, group 128'
        """
        grid = f"int{self.bits}" if self.grid in ("int", "shifted") else self.grid
        if self.codebook is not None:
            return f"{self.codebook.entries} entries of {self.codebook.dim} in {self.codebook.books} codebooks"
        sign = "symmetric" if self.symmetric else "asymmetric"
        sign = "shifted" if self.grid == "shifted" else sign
        if self.bits == 1:
            grid, sign = "binary", "±1"
        where = f"group {self.group_size}" if self.group_size else self.granularity
        where = f"channel of {self.group_size} tokens" if self.groups_tokens else where
        where = f"{self.clusters} clusters of channels" if self.clusters else where
        kept = f", {self.kept} columns kept" if self.kept else ""
        how = "static " if self.static else "clipped " if self.clipped else ""
        kept += {"half": ", scales in half precision", "blocks": ", scales in blocks"}.get(
            self.scales, ""
        )
        return f"{grid} {sign}, {how}{where}{kept}"


def _impossible_in_attention(name: str, part: TensorScheme) -> str | None:
    """Why queries, keys or values cannot have this granularity."""
    if part.grid == "codebook":
        return None  # which has no scales
    if part.static and part.group_size is not None:
        return (
            f"a static scale of the {name} is for all tokens, and of no group of dimensions: leave out group_size, "
            "and set granularity=tensor, head or channel"
        )
    if part.groups_tokens and name != "key":
        return (
            f"only keys have scales for groups of tokens: set {name}.granularity=group for groups of adjacent "
            "dimensions, or token"
        )
    if part.granularity == "channel" and not (part.static or part.groups_tokens):
        grouped = f", or {name}.group_size=32 for a scale every 32 tokens" if name == "key" else ""
        return (
            f"the {name} has dynamic scales per token, not per channel: set granularity=token, or "
            f"{name}.static=true{grouped}"
        )
    if part.granularity in ("tensor", "head") and not part.static:
        return (
            f"a dynamic scale of the {name} per {part.granularity} would change with every token that is still to "
            f"come: set {name}.static=true, or granularity=token"
        )
    return None


_WIDTH = r"(\d+|fp8|nf4|mxfp4|nvfp4)"
_NOTATION = re.compile(rf"w{_WIDTH}a{_WIDTH}(?:q{_WIDTH})?(?:kv{_WIDTH})?(?:g(\d+))?")


class Scheme(BaseModel):
    """What happens in one decoder layer; `None` means left alone (the notation's 16)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: TensorScheme | None = None
    activation: TensorScheme | None = None
    query: TensorScheme | None = None
    key: TensorScheme | None = None
    value: TensorScheme | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weight is not None and self.weight.static:
            raise ValueError("static is for activations, and a weight's scale never changes")
        for name in ("weight", "activation"):
            part: TensorScheme | None = getattr(self, name)
            if part is not None and part.granularity == "head":
                raise ValueError(f"the {name} has no heads: only queries, keys and values have")
            if part is not None and part.groups_tokens:
                raise ValueError(
                    f"the {name} has no groups of tokens, only keys have: set granularity=group, or leave "
                    "out group_size"
                )
        for name in ("query", "key", "value"):
            part = getattr(self, name)
            if part is not None and (reason := _impossible_in_attention(name, part)):
                raise ValueError(reason)
            if part is not None and part.grid == "nvfp4":
                raise ValueError(
                    f"the {name} has no global scale, which nvfp4 takes from calibration text: choose mxfp4"
                )
        for name in ("activation", "query", "key"):
            part = getattr(self, name)
            if part is not None and part.grid == "codebook":
                raise ValueError(f"the {name} has no codebook: only weights and values have")
        for name in ("activation", "query", "key", "value"):
            part = getattr(self, name)
            if part is not None and part.grid == "shifted":
                raise ValueError(
                    f"the {name} has no grid shifted: only imported and trained weights have"
                )
        for name in ("weight", "query", "key", "value"):
            part = getattr(self, name)
            if part is not None and part.clusters:
                raise ValueError(f"the {name} has no clusters of channels: only activations have")
            if part is not None and part.clipped:
                raise ValueError(f"the {name} has no clipped=true: only activations have")
        for name in ("activation", "query", "key", "value"):
            part = getattr(self, name)
            if part is not None and part.kept:
                raise ValueError(f"the {name} keeps no columns: only weights do")
            if part is not None and part.scales != "storage":
                raise ValueError(f"the {name} has no scales={part.scales}: only weights have")
        return self

    @classmethod
    def parse(cls, notation: str) -> Self:
        """Read `w<bits>a<bits>[q<bits>][kv<bits>][g<group>]`; 16 leaves a tensor alone.

        Weights are asymmetric; activations dynamic, per token, symmetric at 8 bits and asymmetric below;
        queries, keys and values per token and head, asymmetric, dynamic. `fp8`, `nf4`, `mxfp4` and `nvfp4` stand
        for the grids of that name; the last two bring their groups with them.

        >>> Scheme.parse("w4a16g128").weight.describe()
        'int4 asymmetric, group 128'
        >>> Scheme.parse("w4a4q4kv4").key.describe()
        'int4 asymmetric, token'

        Raises RecipeError, naming the notation, when it cannot be read.
        """
        match = _NOTATION.fullmatch(notation.strip().lower())
        if match is None:
            raise RecipeError(
                f"Scheme '{notation}' cannot be read: write w<bits>a<bits>[q<bits>][kv<bits>][g<group>], "
                "for example w4a16g128 or w4a4q4kv4."
            )
        weight, activation, query, kv, group = match.groups()
        try:
            if group is not None and weight == "16":
                raise ValueError(f"a group of {group} needs quantized weights")
            heads = {
                "query": _activation(query, symmetric_at_8=False),
                "key": _activation(kv, symmetric_at_8=False),
                "value": _activation(kv, symmetric_at_8=False),
            }
            return cls(
                weight=_weight(weight, None if group is None else int(group)),
                activation=_activation(activation, symmetric_at_8=True),
                **heads,
            )
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            reason = reason.replace("Input", ".".join(map(str, first["loc"])))
            raise RecipeError(
                f"Scheme '{notation}' is impossible: {reason}; integer grids have 2 to 8 bits, "
                "16 leaves a tensor alone."
            ) from error
        except ValueError as error:
            raise RecipeError(f"Scheme '{notation}' is impossible: {error}.") from error

    @property
    def notation(self) -> str:
        """The papers' short form; what it cannot say (symmetry, static) is left out."""
        text = f"w{_width(self.weight)}a{_width(self.activation)}"
        if self.query is not None:
            text += f"q{_width(self.query)}"
        if self.key is not None or self.value is not None:
            text += f"kv{_width(self.key or self.value)}"
        weight = self.weight
        if weight is not None and weight.group_size is not None and not weight.fp4:
            text += f"g{weight.group_size}"
        return text

    @property
    def quantizes_attention(self) -> bool:
        """Whether queries, keys or values are quantized."""
        return not (self.query is None and self.key is None and self.value is None)


def _width(scheme: TensorScheme | None) -> str:
    if scheme is None:
        return "16"
    if scheme.grid in ("int", "shifted", "codebook"):
        return str(scheme.bits)
    return {"fp8_e4m3": "fp8"}.get(scheme.grid, scheme.grid)


def _grid(width: str) -> dict[str, object]:
    """Of a scheme what a width of the notation says."""
    if width.isdigit():
        return {"bits": int(width)}
    grid = {"fp8": "fp8_e4m3"}.get(width, width)
    fields: dict[str, object] = {"grid": grid, "bits": _FIXED_BITS[grid], "symmetric": True}
    if grid in _FIXED_GROUPS:
        fields |= {"granularity": "group", "group_size": _FIXED_GROUPS[grid]}
    return fields


def _weight(width: str, group: int | None) -> TensorScheme | None:
    if width == "16":
        return None
    asked = {} if group is None else {"granularity": "group", "group_size": group}
    return TensorScheme.model_validate({"symmetric": False} | _grid(width) | asked)


def _activation(width: str | None, *, symmetric_at_8: bool) -> TensorScheme | None:
    if width is None or width == "16":
        return None
    symmetric = symmetric_at_8 and width == "8"
    return TensorScheme.model_validate(
        {"symmetric": symmetric, "granularity": "token"} | _grid(width)
    )
