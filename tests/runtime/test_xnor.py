"""Products of signs: the integers of float64, compiled and plain, however many threads."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitfold.errors import RecipeError
from bitfold.runtime.compiled import DISABLED, forget_kernels
from bitfold.runtime.xnor import (
    Signs,
    pack_signs,
    panels_of,
    signed_linear,
    xnor_kernel,
    xnor_product,
)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "plain":
        monkeypatch.setenv(DISABLED, "1")
    forget_kernels()
    if request.param == "compiled" and xnor_kernel().library is None:
        pytest.skip(xnor_kernel().why)
    assert (xnor_kernel().library is None) == (request.param == "plain")
    yield request.param
    monkeypatch.undo()
    forget_kernels()


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of which some are 0 and some −0."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.abs() < 0.1, x * 0.0, x)


def sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).double()


@pytest.mark.parametrize("k", [1, 3, 63, 64, 65, 128, 200, 257, 1000])
@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (1, 64), (2, 65), (3, 5), (4, 31), (5, 130), (67, 33), (130, 64)]
)
@pytest.mark.usefixtures("way")
def test_integers(m: int, n: int, k: int) -> None:
    x, w = random(m, k), random(n, k, seed=1)
    left, right = pack_signs(x), pack_signs(w)
    assert left.words.shape == (m, -(-k // 64))
    found = xnor_product(left, right)
    assert found.dtype == torch.int32
    assert torch.equal(found.double(), sign(x) @ sign(w).T)
    assert torch.equal(xnor_product(left, right, panels_of(right)), found)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 70), (5, 0, 70), (0, 0, 0), (3, 4, 0)])
@pytest.mark.usefixtures("way")
def test_nothing(m: int, n: int, k: int) -> None:
    found = xnor_product(pack_signs(torch.ones(m, k)), pack_signs(torch.ones(n, k)))
    assert torch.equal(found, torch.zeros(m, n, dtype=torch.int32))


@pytest.mark.usefixtures("way")
def test_rows_longer_than_sums_of_16_bits() -> None:
    """Where everything differs, and where nothing does."""
    k = 64 * 1100 + 7
    ones = torch.ones(5, k)
    left, right = pack_signs(ones), pack_signs(-ones[:2])
    assert (xnor_product(left, right) == -k).all()
    assert (xnor_product(left, left) == k).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("way")
def test_signs_at_the_edges(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 2
    edges = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, tiny, -tiny, 1.0, -1.0]
    x = torch.tensor([edges * 13], dtype=dtype)
    wanted = [value == -torch.inf or value in (-1.0, -tiny) for value in edges] * 13
    words = pack_signs(x).words.flatten().tolist()
    found = [bool(words[i // 64] >> (i % 64) & 1) for i in range(64 * len(words))]
    assert found == wanted + [False] * (len(found) - len(wanted))


@pytest.mark.usefixtures("way")
def test_any_strides() -> None:
    x = random(70, 130)
    for view in (x.T, x[::3], x[:, ::2], x[:, 5:69], x.flip(1), x[:1].expand(4, -1)):
        assert torch.equal(pack_signs(view).words, pack_signs(view.clone()).words)
    numbers = torch.randint(-2, 3, (9, 70), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_signs(numbers).words, pack_signs(numbers.float()).words)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads(threads: int) -> None:
    x, w = random(150, 4000), random(1000, 4000, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        left, right = pack_signs(x), pack_signs(w)
        alone = xnor_product(left, right)
        torch.set_num_threads(threads)
        assert torch.equal(pack_signs(x).words, left.words)
        assert torch.equal(xnor_product(left, right), alone)
    finally:
        torch.set_num_threads(before)


def test_compiled_and_plain_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words, integers, and numbers to the last bit."""
    x, w = random(37, 333), random(90, 333, seed=1)
    factors = {"of_column": random(90, seed=2), "of_row": random(37, seed=3), "bias": random(90)}
    found = []
    for disabled in ("", "1"):
        monkeypatch.setenv(DISABLED, disabled)
        forget_kernels()
        right = pack_signs(w)
        found.append((right.words, xnor_product(pack_signs(x), right)))
        for names in ([], ["of_column"], ["of_row", "bias"], list(factors)):
            some = {name: factors[name] for name in names}
            found[-1] += (signed_linear(x, right, panels_of(right), **some),)
    monkeypatch.undo()
    forget_kernels()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_kernel_that_miscounts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitfold.runtime import xnor

    monkeypatch.setattr(xnor, "_is_right", lambda library: False)
    forget_kernels()
    found = xnor_kernel()
    assert found.library is None
    assert "plain PyTorch" in found.why
    monkeypatch.undo()
    forget_kernels()


def test_after_a_fork() -> None:
    """A process that has multiplied in threads forks, as a DataLoader's does, and its children multiply."""
    code = """
import torch
from torch.utils.data import DataLoader
from bitfold.runtime.xnor import pack_signs, xnor_product
torch.set_num_threads(2)
x = torch.randn(512, 4096)
torch.mm(x, x.T)
wanted = xnor_product(pack_signs(x), pack_signs(x))
class Products(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, at):
        torch.get_num_threads = lambda: 2  # of PyTorch's own threads a child may start none
        return xnor_product(pack_signs(x), pack_signs(x))
for found in DataLoader(Products(), num_workers=2, batch_size=1):
    assert torch.equal(found[0], wanted)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_what_cannot_be() -> None:
    with pytest.raises(RecipeError, match="same length"):
        xnor_product(pack_signs(torch.ones(2, 3)), pack_signs(torch.ones(2, 4)))
    with pytest.raises(RecipeError, match="same length"):
        signed_linear(torch.ones(2, 3), pack_signs(torch.ones(2, 4)))
    with pytest.raises(RecipeError, match="a matrix"):
        pack_signs(torch.ones(3))
    assert Signs(torch.zeros(1, 1, dtype=torch.int64), 3).bits == 3
