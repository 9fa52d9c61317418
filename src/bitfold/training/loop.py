"""The training loop that quantization-aware training, QLoRA and BitFit share: AdamW on named tensors, resumable.

    loop = Loop(model, parameters, loss, rows, LoopOptions(steps=200, rate=1e-3))
    result = loop.run()

It knows nothing of quantization: what is trained are the tensors it is given, by a loss it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitfold.errors import RecipeError
from bitfold.runtime.device import has_fast_bfloat16
from bitfold.training.loop_state import LoopState, read_state, write_state

__all__ = ["Loop", "LoopOptions", "LoopResult", "Progress", "rate_at"]

Progress = Callable[[float, int, str], None]
"""Called with the steps done, the steps in all, and what is being done: as `bitfold.report.progress` shows it."""

_SAVE_SECONDS = 60.0
_NOT_FINITE = "the loss before the first step is not finite: nothing was trained"


@dataclass(frozen=True)
class LoopOptions:
    """steps: of the optimizer. batch: rows in a step, accumulate: in how many pieces they go through the model, one
    after the other, so that only a piece is in memory. rate: the highest, reached after `warmup`, a share of the steps;
    it falls to zero as `decay` says. betas, weight_decay: AdamW's (arXiv 1711.05101). clip: the largest norm of all
    gradients together; None leaves them. seed: of the order of rows, and of what the model draws as it trains. looks:
    how often in a run the state is judged and written. keep: `best`, the state that was judged best, or `last`.
    precision: of matrix products; `auto` is bfloat16 where the processor has instructions for it, and float32
    elsewhere.

    Raises RecipeError for what cannot be.
    """

    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    rate: float = 1e-3
    warmup: float = 0.05
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    seed: int = 0
    looks: int = 5
    keep: Literal["best", "last"] = "last"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what cannot be, by name."""
        for name in ("steps", "batch", "accumulate", "looks"):
            if getattr(self, name) < 1:
                raise RecipeError(
                    f"{name} must be at least 1, not {getattr(self, name)}: give a larger number"
                )
        if self.accumulate > self.batch:
            raise RecipeError(
                f"A batch of {self.batch} cannot go in {self.accumulate} pieces: "
                f"set accumulate to at most {self.batch}"
            )
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise RecipeError(f"A rate of {self.rate} trains nothing: give a number above 0")
        if not 0 <= self.warmup < 1:
            raise RecipeError(
                f"warmup is a share of the steps, from 0 to below 1, not {self.warmup}"
            )
        if self.clip is not None and not self.clip > 0:
            raise RecipeError(f"clip={self.clip} stops training: give a number above 0, or None")
        choices = {"decay": ("cosine", "linear", "constant"), "keep": ("best", "last")}
        choices["precision"] = ("auto", "float32", "bfloat16")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"{name}='{getattr(self, name)}' is unknown: choose one of {', '.join(known)}"
                )


@dataclass(frozen=True)
class LoopResult:
    """losses: of every step, those of an earlier run that was resumed too. looks: (step, figure) of every judgement;
    kept: the step whose state the tensors have now. resumed: the step from which it went on, 0 for a fresh run.
    seconds: of this process alone."""

    losses: tuple[float, ...]
    looks: tuple[tuple[int, float], ...]
    kept: int
    resumed: int
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class Loop:
    """One training run.

    model: put in training mode while it runs, and back. parameters: what is trained, by name, in place. loss: the mean
    loss of a batch, a scalar with a graph; it is given rows of `rows` [n, …] (windows of token ids, or the numbers of
    examples that it looks up itself), and runs under autocast where the precision is bfloat16. options: see there.
    check: judges the state, the less the better; without it the mean loss of the steps since the last look does.
    rates: by name, of the parameters whose rate is not `options.rate`, relative to it. beside: other tensors that
    training changes (statistics of batch norms, observers), which are kept, resumed and put back with the parameters.
    after: called with the number of steps done after each of them, say to clip weights. state: the file that a killed
    run goes on from, removed by nobody here; request: what it must have been written for.

    A loss or a gradient that is not finite ends the run with the best state so far, and a note. The same rows,
    options and start give the same result, whether or not the run was killed on the way.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    loss: Callable[[Tensor], Tensor]
    rows: Tensor
    options: LoopOptions
    check: Callable[[], float] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    after: Callable[[int], None] | None = None
    state: Path | None = None
    request: str = ""
    progress: Progress | None = None

    def run(self) -> LoopResult:
        """Train; see the class. OutputError where the state cannot be written."""
        if not self.parameters:
            raise RecipeError("There is nothing to train: name at least one parameter")
        started = time.perf_counter()
        training, graphs = self.model.training, torch.is_grad_enabled()
        devices = sorted({p.device.index or 0 for p in self.parameters.values() if p.is_cuda})
        self.model.train()
        try:
            # What the caller draws afterwards does not depend on how far a run got.
            with torch.random.fork_rng(devices), torch.enable_grad():
                now, resumed, notes = self._run()
        finally:
            self.model.train(training)
            torch.set_grad_enabled(graphs)
        seconds = time.perf_counter() - started
        looks = tuple((int(step), value) for step, value in now.looks)
        return LoopResult(tuple(now.losses), looks, now.kept, resumed, seconds, tuple(notes))

    def _run(self) -> tuple[LoopState, int, list[str]]:
        options, notes = self.options, list[str]()
        optimizer = self._optimizer()
        now = LoopState()
        if self.state is not None:
            now = read_state(self.state, self.request, self._tensors, optimizer, self.parameters)
        resumed = now.step
        if not now.step:
            now.best = self._copy()
            if self.check is not None:
                now.looks.append((0, self._judge(now, 0)))
                if not math.isfinite(now.looks[0][1]):
                    return LoopState(), 0, [_NOT_FINITE]
        every, saved = math.ceil(options.steps / options.looks), time.monotonic()
        while now.step < options.steps:
            for group in optimizer.param_groups:
                group["lr"] = group["relative"] * rate_at(now.step, options)
            reason = self._step(now, optimizer)
            if reason is not None:
                notes.append(self._go_back(now, reason))
                break
            if self.after is not None:
                self.after(now.step)
            look = now.step % every == 0 or now.step == options.steps
            if look:
                figure = self._judge(now, every)
                if not math.isfinite(figure):
                    notes.append(self._go_back(now, "the judgement"))
                    break
                now.looks.append((now.step, figure))
                if figure <= min(value for _, value in now.looks):
                    now.best, now.kept = self._copy(), now.step
            if self.state is not None and (look or time.monotonic() - saved > _SAVE_SECONDS):
                write_state(
                    self.state, self.request, now, self._tensors, optimizer, self.parameters
                )
                saved = time.monotonic()
            self._report(now.step, f"loss {now.losses[-1]:.3f}")
        else:
            if options.keep == "best":
                self._put(now.best)
            else:
                now.kept = now.step
        optimizer.zero_grad()
        return now, resumed, notes

    def _step(self, now: LoopState, optimizer: torch.optim.Optimizer) -> str | None:
        """One step; what was not finite, in which case nothing was changed."""
        # Drawn anew for each step: so a resumed run draws what an uninterrupted one does.
        torch.manual_seed((self.options.seed << 32) + now.step)
        optimizer.zero_grad()
        batch = self.rows[self._chosen(now.step).to(self.rows.device)]
        total = 0.0
        for piece in batch.tensor_split(min(self.options.accumulate, len(batch))):
            share = len(piece) / len(batch)
            with self._precision():
                loss = self.loss(piece) * share
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            return "the loss"
        with_gradient = [p for p in self.parameters.values() if p.grad is not None]
        limit = math.inf if self.options.clip is None else self.options.clip
        if not torch.isfinite(nn.utils.clip_grad_norm_(with_gradient, limit)):
            return "a gradient"
        optimizer.step()
        now.step += 1
        now.losses.append(total)
        return None

    def _chosen(self, step: int) -> Tensor:
        """The numbers of a step's rows [batch]: all rows once, in an order of its own, before any comes again."""
        count, chosen = len(self.rows), list[Tensor]()
        first = step * self.options.batch
        epoch, skipped = divmod(first, count)
        missing = self.options.batch
        while missing > 0:
            generator = torch.Generator().manual_seed((self.options.seed << 32) + epoch)
            order = torch.randperm(count, generator=generator)[skipped : skipped + missing]
            chosen.append(order)
            missing, epoch, skipped = missing - len(order), epoch + 1, 0
        return torch.cat(chosen)

    def _judge(self, now: LoopState, every: int) -> float:
        if self.check is None:
            latest = now.losses[-every:]
            return sum(latest) / len(latest)
        self._report(now.step, "looking")
        self.model.eval()
        try:
            with torch.no_grad():
                return self.check()
        finally:
            self.model.train()

    def _go_back(self, now: LoopState, reason: str) -> str:
        self._put(now.best)
        return (
            f"{reason} of step {min(now.step + 1, self.options.steps)} was not finite: training ended there with the "
            f"best state before, of step {now.kept}; a smaller rate than {self.options.rate:g} may go on"
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault(self.rates.get(name, 1.0), []).append(parameter)
        return torch.optim.AdamW(
            [{"params": members, "relative": relative} for relative, members in groups.items()],
            lr=self.options.rate,
            betas=self.options.betas,
            weight_decay=self.options.weight_decay,
        )

    def _precision(self) -> AbstractContextManager[Any]:
        kind = next(iter(self.parameters.values())).device
        asked = self.options.precision
        if asked == "float32" or (asked == "auto" and not has_fast_bfloat16(kind)):
            return nullcontext()
        return torch.autocast(kind.type, torch.bfloat16)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.beside}

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(values[name])

    def _report(self, step: int, doing: str) -> None:
        if self.progress is not None:
            self.progress(step, self.options.steps, doing)


def rate_at(step: int, options: LoopOptions) -> float:
    """The rate of step `step`, from 0: it rises linearly over the warm-up, then falls to zero at the end.

    Cosine: ½(1 + cos πp) of SGDR without restarts (arXiv 1608.03983), p the share of the steps after the warm-up that
    are done; linear: 1 − p.

    >>> [round(rate_at(step, LoopOptions(steps=4, rate=1.0, warmup=0.0)), 3) for step in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    rising = math.ceil(options.warmup * options.steps)
    if step < rising:
        return options.rate * (step + 1) / rising
    done = (step - rising) / (options.steps - rising)
    falls = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
    return options.rate * falls[options.decay]
