"""SmoothQuant's and AWQ's diagonals from the papers' formulas in plain loops, and their searches on their objective."""

from math import exp, log, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from bitfold.models.family import FcPair, NormSite, QueryKey, Site, UpDown, ValueOutput
from bitfold.numerics import Scheme, TensorScheme
from bitfold.statistics import InputStatistics
from bitfold.transforms import TRANSFORMS, Heads, awq
from bitfold.transforms.awq import Awq
from bitfold.transforms.groups import Diagonal
from bitfold.transforms.smoothquant import SmoothQuant, smoothing_scale
from reference import round_tensor

HEADS = Heads(queries=4, keys=2, size=8)
WIDTH, ROWS = 32, 96
SITES: dict[str, Site] = {
    "norm": NormSite("norm", ("q", "k")),
    "v → o": ValueOutput("v", "o"),
    "up → down": UpDown("up", "o", gate="gate"),
    "fc1 → fc2": FcPair("fc1", "o", homogeneous=True),
}
by_site = pytest.mark.parametrize("kind", SITES)


def inputs() -> Tensor:
    """Rows of a layer's input with outlier channels, and one that is dead."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    x = x * torch.rand(WIDTH, dtype=torch.float64, generator=generator).mul(4).exp()
    x[:, 5] = 0
    return x


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        f"{name}.weight": torch.randn(24, WIDTH, dtype=torch.float64, generator=generator)
        * torch.rand(WIDTH, dtype=torch.float64, generator=generator)
        for name in ("q", "k", "o")
    }
    made["q.weight"][:, 7] = made["k.weight"][:, 7] = made["o.weight"][:, 7] = 0
    return made


def statistics() -> InputStatistics:
    made = InputStatistics(frozenset({"channels", "rows", "gram"}), ROWS)
    made.update(inputs())
    return made


def fit(part: SmoothQuant | Awq, kind: str, scheme: Scheme) -> list[float]:
    site = SITES[kind]
    schemes = dict.fromkeys(("q", "k", "o"), scheme)
    transform = part.fit(site, weights(), statistics(), schemes, HEADS)
    assert isinstance(transform, Diagonal)
    assert transform.site is site
    return transform.scale.tolist()


def entry_of(channel: int, kind: str) -> int:
    """The entry of the diagonal that an input channel of the readers meets: query heads share KV heads."""
    if kind != "v → o":
        return channel
    head, inside = divmod(channel, HEADS.size)
    return head // 2 * HEADS.size + inside


def per_entry(channels: list[float], kind: str) -> list[list[float]]:
    entries = max(entry_of(channel, kind) for channel in range(WIDTH)) + 1
    return [[channels[c] for c in range(WIDTH) if entry_of(c, kind) == e] for e in range(entries)]


def readers(kind: str) -> list[np.ndarray]:
    return [weights()[f"{name}.weight"].numpy() for name in SITES[kind].readers]


# --- SmoothQuant ---


def smooth(alpha: float, kind: str) -> list[float]:
    """s = max|X|^α / max|W|^(1−α), of geometric mean 1 over the channels that live; 1 on the others."""
    x = np.abs(inputs().numpy())
    peak = [max(group) for group in per_entry(x.max(axis=0).tolist(), kind)]
    largest = np.max([np.abs(w).max(axis=0) for w in readers(kind)], axis=0)
    weight_peak = [max(group) for group in per_entry(largest.tolist(), kind)]
    alive = [a > 0 and b > 0 for a, b in zip(peak, weight_peak, strict=True)]
    pairs = zip(peak, weight_peak, alive, strict=True)
    s = [a**alpha / b ** (1 - alpha) if lives else 1.0 for a, b, lives in pairs]
    logarithms = [log(value) for value, lives in zip(s, alive, strict=True) if lives]
    mean = exp(sum(logarithms) / len(logarithms))
    return [value / mean if lives else 1.0 for value, lives in zip(s, alive, strict=True)]


@by_site
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_is_the_formula(alpha: float, kind: str) -> None:
    found = fit(SmoothQuant(alpha=alpha), kind, Scheme.parse("w8a8"))
    assert found == pytest.approx(smooth(alpha, kind), rel=1e-9)


def smooth_error(scale: list[float], kind: str, weight_bits: int | None, act: int | None) -> float:
    """Σ ‖X Wᵀ − Q(X/s) Q(W s)ᵀ‖²"""
    s = np.array([scale[entry_of(channel, kind)] for channel in range(WIDTH)])
    x = inputs().numpy()
    total = 0.0
    for w in readers(kind):
        given, smoothed = x / s, w * s
        if act is not None:
            given = round_tensor(given, WIDTH, act, symmetric=act == 8)
        if weight_bits is not None:
            smoothed = round_tensor(smoothed, WIDTH, weight_bits, symmetric=False)
        total += ((x @ w.T - given @ smoothed.T) ** 2).sum()
    return float(total)


@by_site
@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("w8a8", (8, 8)), ("w4a4", (4, 4)), ("w4a16", (4, None)), ("w16a6", (None, 6))],
)
def test_smoothquants_search_finds_the_best_strength(
    scheme: str, bits: tuple[int | None, int | None], kind: str
) -> None:
    part = SmoothQuant()
    candidates = [smooth(alpha, kind) for alpha in part.candidates]
    nothing = [1.0] * len(candidates[0])
    errors = [smooth_error(s, kind, *bits) for s in (nothing, *candidates)]
    found = smooth_error(fit(part, kind, Scheme.parse(scheme)), kind, *bits)
    assert found <= errors[0] * (1 + 1e-9)  # never worse than nothing
    # Ties at the ends of symmetric grids round either way.
    assert found == pytest.approx(min(errors), rel=0.02 if bits[1] == 8 else 1e-6)


def test_smoothing_helps_where_there_are_outliers() -> None:
    """Else a search that always finds nothing would pass."""
    found = smooth_error(fit(SmoothQuant(), "norm", Scheme.parse("w8a8")), "norm", 8, 8)
    assert found < 0.5 * smooth_error([1.0] * WIDTH, "norm", 8, 8)


def test_smoothquant_behind_norms_only() -> None:
    part = SmoothQuant(alpha=0.5, sites="norms")
    schemes = dict.fromkeys(("q", "k", "o"), Scheme.parse("w8a8"))
    fitted = {
        kind: part.fit(site, weights(), statistics(), schemes, HEADS)
        for kind, site in SITES.items()
    }
    assert [kind for kind, transform in fitted.items() if transform is not None] == ["norm"]


def test_scales_are_finite_whatever_the_inputs() -> None:
    peak = torch.tensor([0.0, 1e-30, 1.0, 1e30, 5.0])
    weight_peak = torch.tensor([1.0, 1e30, 0.0, 1e-30, 1e-3])
    for alpha in (0.0, 0.3, 1.0):
        scale = smoothing_scale(peak, weight_peak, alpha)
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        assert scale[0] == scale[2] == 1


# --- AWQ ---


def shares(kind: str, group: int) -> list[float]:
    """Per channel: the mean over the rows of |w| / the largest |w| of its group."""
    stacked = np.abs(np.concatenate(readers(kind)))
    relative = np.empty_like(stacked)
    for row in range(stacked.shape[0]):
        for start in range(0, WIDTH, group):
            part = stacked[row, start : start + group]
            relative[row, start : start + group] = part / max(part.max(), 1e-12)
    return relative.mean(axis=0).tolist()


def awq_candidates(kind: str, steps: int, group: int, weight_aware: bool) -> list[list[float]]:
    x = np.abs(inputs().numpy()).mean(axis=0).tolist()
    magnitude = [max(sum(part) / len(part), 1e-8) for part in per_entry(x, kind)]
    share = [max(sum(part) / len(part), 1e-8) for part in per_entry(shares(kind, group), kind)]
    found = []
    for step in range(steps + 1):
        r = step / steps
        found.append([m**r for m in magnitude])
        if weight_aware:
            found.append([m**r / w ** (1 - r) for m, w in zip(magnitude, share, strict=True)])
    return [[value / sqrt(max(s) * min(s)) for value in s] for s in found]


def awq_error(scale: list[float], kind: str, bits: int, group: int) -> float:
    """Σ ‖X (Q(W s) s⁻¹ − W)ᵀ‖², on the inputs themselves"""
    s = np.array([scale[entry_of(channel, kind)] for channel in range(WIDTH)])
    x = inputs().numpy()
    return float(
        sum(
            ((x @ (round_tensor(w * s, group, bits, symmetric=False) / s - w).T) ** 2).sum()
            for w in readers(kind)
        )
    )


@by_site
@pytest.mark.parametrize("weight_aware", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 32)])
def test_awq_finds_the_best_scale(bits: int, group: int, weight_aware: bool, kind: str) -> None:
    part = Awq(steps=6, weight_aware=weight_aware)
    candidates = awq_candidates(kind, 6, group, weight_aware)
    errors = [awq_error(scale, kind, bits, group) for scale in candidates]
    scale = fit(part, kind, Scheme.parse(f"w{bits}a16g{group}"))
    found = awq_error(scale, kind, bits, group)
    assert found <= awq_error([1.0] * len(scale), kind, bits, group) * (1 + 1e-9)
    assert found == pytest.approx(min(errors), rel=1e-5)
    assert min(errors) < 0.9 * errors[0]  # there is something to find
    assert any(scale == pytest.approx(candidate, rel=1e-5) for candidate in candidates)


@pytest.mark.parametrize(("counted", "left_alone"), [("q", "k"), ("k", "q")])
def test_awq_counts_only_readers_that_are_quantized(counted: str, left_alone: str) -> None:
    """A reader left alone has no error: the scale is that of the other one."""
    part = Awq(steps=4, weight_aware=False)
    schemes = {counted: Scheme.parse("w3a16g32"), left_alone: Scheme()}
    both = part.fit(NormSite("norm", ("q", "k")), weights(), statistics(), schemes, HEADS)
    alone = part.fit(NormSite("norm", (counted,)), weights(), statistics(), schemes, HEADS)
    assert torch.equal(both.scale, alone.scale)
    assert not torch.equal(both.scale, torch.ones_like(both.scale))


def test_awq_of_many_rows_is_as_good_by_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4096 rows a quarter is looked at: what is found has the least error on all of them, or nearly."""
    torch.manual_seed(0)
    site = NormSite("norm", ("big",))
    x = torch.randn(256, WIDTH, dtype=torch.float64) * torch.logspace(-1, 1, WIDTH)
    wide = {"norm.weight": torch.ones(WIDTH), "big.weight": torch.randn(4096, WIDTH).double()}
    seen = InputStatistics(frozenset({"channels", "gram"}), len(x))
    seen.update(x)
    schemes = {"big": Scheme.parse("w3a16")}
    scales = {}
    for rows in (1024, 4096):
        monkeypatch.setattr(awq, "_ROWS", rows)
        transform = Awq().fit(site, wide, seen, schemes, HEADS)
        assert isinstance(transform, Diagonal)
        scales[rows] = transform.scale
    plain = torch.ones(WIDTH).double()
    by_part, by_all, without = (
        awq._output_error(scale, site, wide, seen.gram, schemes)
        for scale in (scales[1024], scales[4096], plain)
    )
    assert by_all <= by_part <= 1.01 * by_all
    assert by_part < 0.8 * without


def test_awq_with_one_scale_per_tensor() -> None:
    scheme = Scheme(weight=TensorScheme(bits=4, symmetric=False, granularity="tensor"))
    assert len(fit(Awq(steps=4), "norm", scheme)) == WIDTH


# --- where there is nothing to fit ---


@pytest.mark.parametrize(
    "site",
    [
        QueryKey("q", "k", "half-split"),
        QueryKey("q", "k", "none"),
        FcPair("fc1", "o", homogeneous=False),
    ],
    ids=["rotary", "no rotary", "gelu"],
)
@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_sites_that_take_no_diagonal(name: str, site: Site) -> None:
    schemes = dict.fromkeys(("q", "k", "o"), Scheme.parse("w8a8"))
    assert TRANSFORMS[name]().fit(site, weights(), statistics(), schemes, HEADS) is None


@by_site
def test_awq_without_quantized_weights(kind: str) -> None:
    schemes = dict.fromkeys(("q", "k", "o"), Scheme.parse("w16a8"))
    assert Awq().fit(SITES[kind], weights(), statistics(), schemes, HEADS) is None
