"""An LSTM as linear layers is itself, and is quantized like them."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import bitfold
from bitfold.errors import RecipeError
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.training.unrolled_lstm import UnrolledLSTM

SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "bias": False},
    {"bidirectional": True, "batch_first": True},
]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("begun", [False, True])
def test_it_is_the_lstm(shape: dict[str, int], begun: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 7, **shape).double()
    unrolled = UnrolledLSTM(lstm)
    rows = lstm.num_layers * (1 + lstm.bidirectional)
    state = (_random(rows, 4, 7, seed=1), _random(rows, 4, 7, seed=2)) if begun else None
    x = _random(4, 9, 5) if lstm.batch_first else _random(9, 4, 5)
    wanted, (h, c) = lstm(x, state)
    found, (own_h, own_c) = unrolled(x, state)
    for one, other in ((found, wanted), (own_h, h), (own_c, c)):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-12
    single = _random(9, 5)
    assert (unrolled(single)[0] - lstm(single)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("sorted_", [True, False])
def test_packed_sequences(sorted_: bool) -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 7, num_layers=2, bidirectional=True).double()
    lengths = [6, 3, 1] if sorted_ else [3, 6, 1]
    packed = pack_sequence([_random(n, 5, seed=n) for n in lengths], enforce_sorted=sorted_)
    wanted, (h, c) = lstm(packed)
    found, (own_h, own_c) = UnrolledLSTM(lstm)(packed)
    assert isinstance(found, PackedSequence)
    assert torch.equal(found.batch_sizes, wanted.batch_sizes)
    for one, other in ((found.data, wanted.data), (own_h, h), (own_c, c)):
        assert (one - other).abs().max() < 1e-12


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.lstm(x)[0])
        return found


def test_dynamic_int8_is_as_near_as_pytorchs_own() -> None:
    torch.manual_seed(0)
    model, x = Tagger().eval(), torch.randn(8, 20, 16)
    with torch.no_grad():
        wanted = model(x)
    torchs = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.LSTM, nn.Linear})
    bitfold.convert(bitfold.prepare(model, "dynamic", scheme="w8a8"))
    coded = [name for name, one in model.named_modules() if isinstance(one, QuantizedLinear)]
    assert len(coded) == 2 * 4 + 1
    assert "lstm.states.3" in coded
    with torch.no_grad():
        error, own = ((one(x) - wanted).square().mean().sqrt() for one in (torchs, model))
    assert own < 0.02 * wanted.std()
    assert own < 1.2 * error


def test_it_is_trained_through_rounding() -> None:
    torch.manual_seed(0)
    model, x = Tagger(), torch.randn(8, 6, 16)
    wanted = torch.randint(0, 5, (8, 6))
    bitfold.prepare(model, "lsq", scheme="w4a8")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        trained = model.eval()(x)
        assert torch.equal(bitfold.convert(model)(x), trained)


def test_what_is_left_alone_or_refused() -> None:
    model = Tagger()
    bitfold.prepare(model, "dynamic", scheme="w8a8", ignore=["lstm"])
    assert type(model.lstm) is nn.LSTM
    projected = nn.Sequential(nn.LSTM(4, 8, proj_size=2))
    with pytest.raises(RecipeError, match=r"0 projects its state \(proj_size=2\)"):
        bitfold.prepare(projected, "dynamic", scheme="w8a8")
