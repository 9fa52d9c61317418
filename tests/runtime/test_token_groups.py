"""Keys in groups of tokens: what each query sees, against loops in float64, however the tokens come in."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bitfold.errors import RecipeError
from bitfold.numerics import Scheme, TensorScheme
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.runtime.attention import ATTENTION, HeadQuantizers, set_head_quantizers
from reference import round_tensor

BATCH, HEADS, TOKENS, SIZE, GROUP, BITS = 2, 2, 19, 8, 4, 3
KEY = TensorScheme(bits=BITS, symmetric=False, granularity="channel", group_size=GROUP)


def attention(**options: object) -> nn.Module:
    module = nn.Module()
    set_head_quantizers(module, HeadQuantizers.of(Scheme(key=KEY), **options))
    return module


def random(seed: int, tokens: int = TOKENS, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, heads, tokens, SIZE, generator=generator, dtype=torch.float64)


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """[batch, heads, queries, head_dim]"""
    found: Tensor = ALL_ATTENTION_FUNCTIONS[ATTENTION](module, q, k, v, mask, scaling=0.4)[0]
    return found.transpose(1, 2)


def by_loops(q: Tensor, k: Tensor, v: Tensor, hidden: int = 0) -> np.ndarray:
    """Each token's query by itself: full groups of its time are rounded. hidden: first tokens that none sees."""
    result = np.zeros(q.shape)
    for b, h, t in np.ndindex(q.shape[:3]):
        if t < hidden:
            continue
        keys = k[b, h, : t + 1].numpy().copy()
        full = (t + 1) // GROUP * GROUP
        for start in range(0, full, GROUP):
            part = keys[start : start + GROUP].T
            keys[start : start + GROUP] = round_tensor(part, GROUP, BITS, symmetric=False).T
        scores = (keys @ q[b, h, t].numpy() * 0.4)[hidden:]
        weights = np.exp(scores - scores.max())
        result[b, h, t] = weights / weights.sum() @ v[b, h, hidden : t + 1].numpy()
    return result


def test_a_whole_window_is_what_each_token_sees_at_its_time() -> None:
    q, k, v = random(0), random(1), random(2)
    found = attend(attention(), q, k, v)
    np.testing.assert_allclose(found.numpy(), by_loops(q, k, v), atol=1e-12)
    plain = attend(nn.Module(), q, k, v)
    assert (found - plain).abs().max() > 0.05


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask(additive: bool) -> None:
    q, k, v = random(0), random(1), random(2)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    seen[:, :3] = False
    mask = seen.expand(BATCH, 1, -1, -1)
    if additive:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    found = attend(attention(), q, k, v, mask)
    np.testing.assert_allclose(found[:, :, 3:].numpy(), by_loops(q, k, v, 3)[:, :, 3:], atol=1e-12)


def test_fewer_kv_heads() -> None:
    q, k, v = random(0, heads=4), random(1), random(2)
    shared = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    module = attention()
    module.num_key_value_groups = 2
    np.testing.assert_allclose(attend(module, q, k, v).numpy(), by_loops(q, *shared), atol=1e-12)


@pytest.mark.parametrize("portion", [1, 2, 3, 5, 7, 16])
def test_portions_with_a_cache_of_keys_as_they_are(portion: int) -> None:
    """What an ordinary cache does: all keys that there have been, the queries of the newest."""
    q, k, v = random(0), random(1), random(2)
    module, whole = attention(), attend(attention(), q, k, v)
    for start in range(0, TOKENS, portion):
        stop = min(start + portion, TOKENS)
        mask = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        found = attend(
            module,
            q[:, :, start:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            mask.expand(BATCH, 1, -1, -1),
        )
        torch.testing.assert_close(found, whole[:, :, start:stop], atol=1e-12, rtol=0)


def test_nothing_depends_on_later_tokens() -> None:
    q, k, v = random(0), random(1), random(2)
    before = attend(attention(), q, k, v)
    k[:, :, 10:] *= 7
    after = attend(attention(), q, k, v)
    assert torch.equal(before[:, :, :10], after[:, :, :10])
    assert not torch.allclose(before[:, :, 10:], after[:, :, 10:])


def test_gradients_reach_keys_in_both_forms() -> None:
    q, v = random(0), random(2)
    k = random(1).requires_grad_()
    attend(attention(quantize=fake_quantize_trainable), q, k, v).square().sum().backward()
    assert k.grad is not None
    assert bool((k.grad.abs().amax(-1) > 0)[:, :, :-1].all())


def test_a_window_whose_groups_an_ordinary_cache_has_dropped() -> None:
    module, q, k = attention(), random(0), random(1)
    function = ALL_ATTENTION_FUNCTIONS[ATTENTION]
    function(module, q, k, k, None, sliding_window=8)  # a pass from the first token on
    with pytest.raises(RecipeError, match=r"pass past_key_values=bitfold.quantized_cache\(model\)"):
        function(module, q[:, :, -1:], k[:, :, -8:], k[:, :, -8:], None, sliding_window=8)
