"""An LSTM as the linear layers it is made of, so that what rounds linear layers rounds it too."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bitfold.errors import RecipeError

__all__ = ["UnrolledLSTM"]

State = tuple[Tensor, Tensor]


class UnrolledLSTM(nn.Module):
    """Computes what an `nn.LSTM` does, a step after the other, with an `nn.Linear` for the inputs and one for the state
    of each layer and direction: their parameters are the LSTM's own.

    i, f, g, o = split(W_x x + b_x + W_h h + b_h); c ← σ(f) c + σ(i) tanh(g); h ← σ(o) tanh(c).

    inputs, states: by layer, and in it by direction; names are inputs.0 … and states.0 ….
    """

    def __init__(self, lstm: nn.LSTM, name: str = "the LSTM") -> None:
        """Raises RecipeError for an LSTM whose state is projected."""
        super().__init__()
        if lstm.proj_size:
            raise RecipeError(
                f"{name} projects its state (proj_size={lstm.proj_size}), which is not unrolled: leave it alone by "
                f"ignore=['{name}']."
            )
        self.input_size, self.hidden_size = lstm.input_size, lstm.hidden_size
        self.num_layers, self.bidirectional = lstm.num_layers, lstm.bidirectional
        self.batch_first, self.dropout = lstm.batch_first, lstm.dropout
        ways = ("", "_reverse") if lstm.bidirectional else ("",)
        ends = [f"l{layer}{way}" for layer in range(lstm.num_layers) for way in ways]
        self.inputs = nn.ModuleList(_linear(lstm, "ih", end) for end in ends)
        self.states = nn.ModuleList(_linear(lstm, "hh", end) for end in ends)

    def forward(
        self, x: Tensor | PackedSequence, state: State | None = None
    ) -> tuple[Tensor | PackedSequence, State]:
        """As of `nn.LSTM`: x [tokens, batch, in], batch first where it was, without a batch, or packed; state h and c
        [layers · directions, batch, hidden]."""
        if isinstance(x, PackedSequence):
            padded, lengths = pad_packed_sequence(x)
            given = None if state is None else state
            y, last = self._run(padded, lengths.to(padded.device), given)
            return pack_padded_sequence(y, lengths, enforce_sorted=False), last
        single = x.dim() == 2
        if single:
            x = x.unsqueeze(1)
            state = None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1))
        elif self.batch_first:
            x = x.transpose(0, 1)
        y, (h, c) = self._run(x, None, state)
        if single:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return (y.transpose(0, 1) if self.batch_first else y), (h, c)

    def _run(self, x: Tensor, lengths: Tensor | None, state: State | None) -> tuple[Tensor, State]:
        """x: [tokens, batch, in]; lengths: [batch], of sequences that are padded at their ends."""
        directions = 1 + self.bidirectional
        if state is None:
            shape = (self.num_layers * directions, x.shape[1], self.hidden_size)
            state = (x.new_zeros(shape), x.new_zeros(shape))
        ended: list[State] = []
        for layer in range(self.num_layers):
            found = []
            for way in range(directions):
                place = layer * directions + way
                begun = (state[0][place], state[1][place])
                y, last = self._direction(place, x, lengths, begun, backward=way == 1)
                found.append(y)
                ended.append(last)
            x = torch.cat(found, dim=-1)
            if layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        return x, (torch.stack([h for h, _ in ended]), torch.stack([c for _, c in ended]))

    def _direction(
        self, place: int, x: Tensor, lengths: Tensor | None, state: State, *, backward: bool
    ) -> tuple[Tensor, State]:
        """[tokens, batch, hidden], and the state behind the last token, or before the first if backward."""
        h, c = state
        of_inputs, of_states = self.inputs[place](x), self.states[place]
        steps = range(len(x) - 1, -1, -1) if backward else range(len(x))
        found: list[Tensor] = [h] * len(x)
        for t in steps:
            i, f, g, o = (of_inputs[t] + of_states(h)).chunk(4, dim=-1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * new_c.tanh()
            if lengths is None:
                h, c, found[t] = new_h, new_c, new_h
                continue
            here = (lengths > t).unsqueeze(-1)
            h, c = torch.where(here, new_h, h), torch.where(here, new_c, c)
            found[t] = torch.where(here, new_h, torch.zeros_like(new_h))
        return torch.stack(found), (h, c)


def _linear(lstm: nn.LSTM, kind: str, end: str) -> nn.Linear:
    weight = lstm.get_parameter(f"weight_{kind}_{end}")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=lstm.bias, device="meta")
    linear.weight = weight
    if lstm.bias:
        linear.bias = lstm.get_parameter(f"bias_{kind}_{end}")
    return linear.train(lstm.training)
