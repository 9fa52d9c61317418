"""Every row of DESIGN section 3, in float64 on random models of every family with random gains and biases:
a member of the group leaves the logits where they were, a matrix just outside it does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitfold.errors import EquivalenceError
from bitfold.models import family_of
from bitfold.models.family import (
    ONLINE,
    FcPair,
    NormSite,
    QueryKey,
    Site,
    UpDown,
    ValueOutput,
    head_counts,
)
from bitfold.numerics import MapShape, hadamard_size
from bitfold.runtime.attention import ATTENTION
from bitfold.runtime.online import OnlineMap, attach
from bitfold.transforms.groups import (
    Diagonal,
    HeadMatrix,
    HeadPermutation,
    Heads,
    NormedPairScale,
    OnlineMatrix,
    Permutation,
    RotaryScale,
    Transform,
    fold,
)
from bitfold.transforms.online import OnlineHadamard, OnlineHeads, OnlineKronecker
from models_zoo import TOKENS, in_float64, random_model

SAME, DIFFERENT = 1e-10, 1e-3
FAMILIES = ("llama", "llama-biased", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "opt")


def _positive(size: int) -> Tensor:
    return torch.rand(size, dtype=torch.float64) * 1.5 + 0.5


def _matrices(count: int, size: int) -> tuple[Tensor, Tensor]:
    blocks = torch.eye(size, dtype=torch.float64) * 2 + torch.randn(
        count, size, size, dtype=torch.float64
    ) / (2 * size**0.5)
    return blocks, torch.linalg.inv(blocks)


class _Case:
    """A model, its sites, and the logits it gave."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(1)
        self.model: PreTrainedModel = in_float64(random_model(name, torch.float64))
        config = self.model.config
        self.family = family_of(config.model_type)
        self.heads = Heads(*head_counts(config))
        self.sites = self.family.sites(config)
        self.before = self.logits()

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.model(TOKENS).logits

    def site(self, kind: type[Site]) -> Site | None:
        return next((site for site in self.sites if isinstance(site, kind)), None)

    def change(
        self,
        make: Callable[[dict[str, Tensor]], Transform | None],
        storage: torch.dtype | None = None,
    ) -> float | None:
        """Fold a transform into every block; the relative change of the logits, None if there was none to make."""
        for block in self.model.get_submodule(self.family.blocks):
            weights = {name: value.data for name, value in block.named_parameters()}
            transform = make(weights)
            if transform is None:
                return None
            assert transform.defect() < 1e-9
            for name, value in transform.fold(weights, self.heads, storage).items():
                owner, online, part = name.partition(f".{ONLINE}.")
                if online and not hasattr(block.get_submodule(owner), ONLINE):
                    attach(block.get_submodule(owner), OnlineMap(_shape(transform, part, value)))
                block.get_parameter(name).data = value
        return float((self.logits() - self.before).norm() / self.before.norm())


def _shape(transform: Transform, part: str, value: Tensor) -> MapShape:
    if isinstance(transform, OnlineKronecker):
        return MapShape("kronecker", (len(transform.left), len(transform.right)))
    if part == "keys":
        return MapShape("heads", tuple(value.shape[:2]))
    if part == "signs":
        return MapShape("hadamard", tuple(value.shape))
    return MapShape("blocks", tuple(value.shape[:2]))


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> _Case:
    return _Case(request.param)


def _has_biases(weights: dict[str, Tensor], *names: str) -> bool:
    return all(f"{name}.bias" in weights for name in names)


def test_norm_takes_a_diagonal_and_a_shift_where_it_has_a_bias(case: _Case) -> None:
    for site in case.sites:
        if not isinstance(site, NormSite):
            continue

        def make(weights: dict[str, Tensor], site: NormSite = site) -> Transform:
            size = weights[f"{site.norm}.weight"].numel()
            signs = torch.randint(0, 2, (size,)) * 2 - 1
            shift = torch.randn(size, dtype=torch.float64)
            carried = _has_biases(weights, site.norm, *site.readers)
            return Diagonal(site, _positive(size) * signs, shift if carried else None)

        assert case.change(make) < SAME


# --- what runs behind a norm ---


def _online(site: NormSite, weights: dict[str, Tensor], count: int) -> OnlineMatrix:
    """A random matrix of so many blocks, and a shift where it can be carried."""
    width = weights[f"{site.norm}.weight"].numel()
    carried = _has_biases(weights, site.norm, *site.readers)
    shift = torch.randn(width, dtype=torch.float64) if carried else None
    return OnlineMatrix(site, *_matrices(count, width // count), shift)


@pytest.mark.parametrize("count", [1, 4], ids=["full", "block-diagonal"])
def test_any_matrix_may_run_behind_a_norm(case: _Case, count: int) -> None:
    norms = [site for site in case.sites if isinstance(site, NormSite)]
    assert len(norms) == 2
    for site in norms:
        assert case.change(lambda weights, site=site: _online(site, weights, count)) < SAME


def test_what_runs_behind_a_norm_takes_more_and_a_diagonal_too(case: _Case) -> None:
    """The order in which matrices are multiplied, and a shift that has to go before them."""
    for site in case.sites:
        if not isinstance(site, NormSite):
            continue

        def diagonal(weights: dict[str, Tensor], site: NormSite = site) -> Transform:
            found = _online(site, weights, 1)
            return Diagonal(site, _positive(found.blocks.shape[-1]), found.shift)

        for count in (4, 1, 2):
            assert case.change(lambda w, site=site, n=count: _online(site, w, n)) < SAME
        gain = _gain(case, site)
        assert case.change(diagonal) < SAME
        assert torch.equal(_gain(case, site), gain)


def _gain(case: _Case, site: NormSite) -> Tensor:
    block = case.model.get_submodule(case.family.blocks)[0]
    return block.get_parameter(f"{site.norm}.weight").data.clone()


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("wrong", ["side", "inverse", "reader left out", "order"])
def test_a_matrix_on_the_wrong_side_is_no_equivalence(name: str, wrong: str) -> None:
    case = _Case(name)
    site = case.site(NormSite)

    class Wrong(OnlineMatrix):
        def fold(self, weights, heads, storage=None):
            before = weights[site.online]
            right = super().fold(weights, heads, storage)
            reader = f"{site.readers[0]}.weight"
            if wrong == "side":
                right[reader] = weights[reader] @ self.blocks[0]  # A in place of its transpose
            elif wrong == "inverse":
                right[site.online] = self.blocks.transpose(1, 2) @ before
            elif wrong == "reader left out":
                right[reader] = weights[reader]
            else:
                right[site.online] = before @ self.blocks_inverse.transpose(1, 2)
            return right

    assert case.change(lambda weights: _online(site, weights, 1)) < SAME
    change = case.change(lambda w: Wrong(site, *_matrices(1, w[f"{site.norm}.weight"].numel())))
    assert change > DIFFERENT


def test_a_shift_in_front_of_a_matrix_needs_a_bias() -> None:
    case = _Case("llama")
    site = case.site(NormSite)
    ones = torch.ones(64, dtype=torch.float64)
    with pytest.raises(EquivalenceError, match="no bias"):
        case.change(lambda w: OnlineMatrix(site, *_matrices(1, 64), ones))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_storage_rounding_of_what_runs_costs_no_equivalence(storage: torch.dtype) -> None:
    """The second one too, which is multiplied with a rounded one and rounded again."""
    case = _Case("opt")
    site = case.site(NormSite)
    for _ in range(2):
        assert case.change(lambda weights: _online(site, weights, 1), storage) < SAME
        block = case.model.get_submodule(case.family.blocks)[0]
        stored = block.get_parameter(site.online)
        assert torch.equal(stored, stored.to(storage).double())


def _signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape, dtype=torch.float64) * 2 - 1


def test_a_hadamard_matrix_runs_before_any_reader(case: _Case) -> None:
    """In copies, and on what lies between: across heads."""
    for kind in (NormSite, ValueOutput, UpDown, FcPair):
        site = case.site(kind)
        if site is None:
            continue

        def make(weights: dict[str, Tensor], site: Site = site) -> Transform:
            width = weights[f"{site.readers[0]}.weight"].shape[1]
            inner = case.heads.size if isinstance(site, ValueOutput) else 1
            size = hadamard_size(width // inner // 2)
            return OnlineHadamard(site, _signs(width // inner // size, size, inner))

        assert case.change(make) < SAME


def test_queries_and_keys_meet_behind_the_same_hadamard_matrix(case: _Case) -> None:
    case.model.set_attn_implementation(ATTENTION)
    site = case.site(QueryKey)
    assert case.change(lambda weights: OnlineHadamard(site, _signs(1, case.heads.size, 1))) < SAME


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_queries_and_keys_meet_behind_matrices_of_heads(
    storage: torch.dtype | None, case: _Case
) -> None:
    """Rounded for storage they are still undone: queries take the inverse of what is stored. Two are multiplied."""
    case.model.set_attn_implementation(ATTENTION)
    site = case.site(QueryKey)

    def make(weights: dict[str, Tensor]) -> Transform:
        return OnlineHeads(site, _matrices(case.heads.keys, case.heads.size)[0])

    assert make({}).defect() < SAME
    assert case.change(make, storage) < SAME
    one, two = (_matrices(case.heads.keys, case.heads.size)[0] for _ in range(2))
    name = f"{site.runs_at}.online.keys"
    both = OnlineHeads(site, two).fold({name: one}, case.heads)[name]
    assert torch.allclose(both, one @ two, atol=1e-12)


def test_a_kronecker_product_runs_before_any_reader(case: _Case) -> None:
    for kind in (NormSite, ValueOutput, UpDown, FcPair):
        site = case.site(kind)
        if site is None:
            continue

        def make(weights: dict[str, Tensor], site: Site = site) -> Transform:
            width = weights[f"{site.readers[0]}.weight"].shape[1]
            left, right = (_matrices(1, size)[0][0] for size in (8, width // 8))
            return OnlineKronecker(site, left, right)

        assert case.change(make) < SAME


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_storage_rounding_of_a_kronecker_product_costs_no_equivalence(storage: torch.dtype) -> None:
    case = _Case("llama")
    site = case.site(UpDown)
    made = OnlineKronecker(site, *(_matrices(1, size)[0][0] for size in (8, 12)))
    assert case.change(lambda weights: made, storage) < SAME


def test_nothing_is_folded_before_what_runs() -> None:
    """It would be read behind the map: x' = x M and the readers' weights are in that basis."""
    case = _Case("llama")
    site = case.site(UpDown)
    weights = {
        "mlp.down_proj.online.signs": _signs(1, 96, 1),
        "mlp.down_proj.weight": torch.ones(64, 96),
    }
    with pytest.raises(EquivalenceError, match="a map runs already"):
        fold(weights, Diagonal(site, torch.ones(96)), case.heads)


# --- heads and MLP ---


def test_value_output_takes_a_matrix_per_head_and_a_shift(case: _Case) -> None:
    site = case.site(ValueOutput)

    def make(weights: dict[str, Tensor]) -> Transform:
        blocks, inverse = _matrices(case.heads.keys, case.heads.size)
        shift = torch.randn(case.heads.keys * case.heads.size, dtype=torch.float64)
        carried = _has_biases(weights, site.value, site.output)
        return HeadMatrix(site, blocks, inverse, shift if carried else None)

    assert case.change(make) < SAME


def test_value_output_on_the_wrong_side_of_head_sharing_is_no_equivalence() -> None:
    case = _Case("llama")
    site = case.site(ValueOutput)

    class Wrong(HeadMatrix):
        def fold(self, weights, heads, storage=None):
            right = super().fold(weights, heads, storage)
            columns = right[f"{site.output}.weight"].unflatten(1, (heads.keys, heads.shared, -1))
            # query head h reads KV head h mod K instead of h div (Q/K)
            right[f"{site.output}.weight"] = columns.transpose(1, 2).flatten(1)
            return right

    assert case.change(lambda w: Wrong(site, *_matrices(2, case.heads.size))) > DIFFERENT


def test_query_key_takes_its_own_group(case: _Case) -> None:
    site = case.site(QueryKey)
    keys, size = case.heads.keys, case.heads.size

    def make(weights: dict[str, Tensor]) -> Transform:
        if site.key_norm is not None:
            signs = torch.randint(0, 2, (keys, size // 2)).double() * 2 - 1
            return NormedPairScale(site, _positive(size // 2), signs)
        if site.rotary == "half-split":
            return RotaryScale(site, *torch.randn(2, keys, size // 2, dtype=torch.float64))
        shift = torch.randn(keys * size, dtype=torch.float64)
        return HeadMatrix(site, *_matrices(keys, size), shift)

    assert case.change(make) < SAME


def test_query_key_with_the_wrong_rotary_pairing_is_no_equivalence() -> None:
    case = _Case("llama")
    site = case.site(QueryKey)
    keys, size = case.heads.keys, case.heads.size

    class Interleaved(RotaryScale):
        def fold(self, weights, heads, storage=None):
            order = torch.arange(size).view(-1, 2).T.flatten()  # j with j + 1 instead of j + size/2
            back = order.argsort()
            weights = dict(weights)
            for name, count in ((site.key, heads.keys), (site.query, heads.queries)):
                rows = weights[f"{name}.weight"].unflatten(0, (count, size))
                weights[f"{name}.weight"] = rows[:, order].flatten(0, 1)
            weights = super().fold(weights, heads, storage)
            for name, count in ((site.key, heads.keys), (site.query, heads.queries)):
                rows = weights[f"{name}.weight"].unflatten(0, (count, size))
                weights[f"{name}.weight"] = rows[:, back].flatten(0, 1)
            return weights

    def make(weights: dict[str, Tensor]) -> Transform:
        return Interleaved(site, *torch.randn(2, keys, size // 2, dtype=torch.float64))

    assert case.change(make) > DIFFERENT


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_query_key_refuses_a_matrix_through_rotary_embedding_or_norms(name: str) -> None:
    case = _Case(name)
    site = case.site(QueryKey)
    with pytest.raises(EquivalenceError, match="rotary embedding or a norm"):
        case.change(lambda w: HeadMatrix(site, *_matrices(case.heads.keys, case.heads.size)))


def test_mlp_takes_a_diagonal_and_a_permutation(case: _Case) -> None:
    site = case.site(UpDown) or case.site(FcPair)
    first = site.up if isinstance(site, UpDown) else site.fc1

    def diagonal(weights: dict[str, Tensor]) -> Transform:
        size = weights[f"{first}.weight"].shape[0]
        signs = torch.randint(0, 2, (size,)) * 2 - 1 if isinstance(site, UpDown) else 1
        return Diagonal(site, _positive(size) * signs)

    def permutation(weights: dict[str, Tensor]) -> Transform:
        return Permutation(site, torch.randperm(weights[f"{first}.weight"].shape[0]))

    assert case.change(diagonal) < SAME
    assert case.change(permutation) < SAME


def test_gelu_takes_a_permutation_and_no_diagonal() -> None:
    case = _Case("opt-gelu")
    site = case.site(FcPair)
    size = case.model.config.ffn_dim
    assert case.change(lambda w: Permutation(site, torch.randperm(size))) < SAME
    with pytest.raises(EquivalenceError, match="does not pass"):
        case.change(lambda w: Diagonal(site, _positive(size)))


def test_a_negative_diagonal_through_relu_is_seen_as_a_defect() -> None:
    site = _Case("opt").site(FcPair)
    assert Diagonal(site, -torch.ones(4, dtype=torch.float64)).defect() > 0
    assert Diagonal(site, torch.zeros(4, dtype=torch.float64)).defect() > 0


def test_heads_may_change_places(case: _Case) -> None:
    value, query = case.site(ValueOutput), case.site(QueryKey)
    order = torch.arange(case.heads.keys).flip(0)
    assert case.change(lambda w: HeadPermutation(value, query, order)) < SAME


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", NormSite), ("qwen2", ValueOutput)],
    ids=["RMSNorm", "o_proj without bias"],
)
def test_a_shift_without_a_bias_is_refused(name: str, kind: type[Site]) -> None:
    case = _Case(name)
    site = case.site(kind)

    def make(weights: dict[str, Tensor]) -> Transform:
        ones = torch.ones(_width(weights, site), dtype=torch.float64)
        return Diagonal(site, ones, ones)

    with pytest.raises(EquivalenceError, match="no bias"):
        case.change(make)


def _width(weights: dict[str, Tensor], site: Site) -> int:
    if isinstance(site, NormSite):
        return weights[f"{site.norm}.weight"].numel()
    assert isinstance(site, ValueOutput)
    return weights[f"{site.value}.weight"].shape[0]


def test_storage_rounding_of_a_norm_costs_no_equivalence() -> None:
    case = _Case("gemma")
    site = case.site(NormSite)

    def make(weights: dict[str, Tensor]) -> Transform:
        class Stored(Diagonal):
            def fold(self, weights, heads, storage=None):
                return super().fold(weights, heads, torch.bfloat16)

        return Stored(site, _positive(64))

    assert case.change(make) < SAME
    stored = case.model.get_submodule(case.family.blocks)[0].get_parameter(f"{site.norm}.weight")
    assert torch.equal(stored, stored.bfloat16().double())
