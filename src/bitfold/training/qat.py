"""Quantization-aware training of a language model, whose result is an ordinary artifact: `bitfold train qat`.

The linear layers of the blocks are trained through their rounding (`bitfold.prepare`), with the norms; embeddings and
head stay. With a teacher the loss is KL(teacher ‖ student), as LLM-QAT has it (arXiv 2305.17888), else that of the next
token. What was trained then takes the place of what round-to-nearest makes in the pipeline, so that the artifact, its
verification and its exports are those of every other method.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitfold.data import default_sequence_length
from bitfold.errors import CheckpointError, DataError, OutputError, RecipeError
from bitfold.evaluate import evaluate
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.evaluate.models import vocab_size
from bitfold.export.reading import StoredModel, read_model
from bitfold.models.checkpoint import sha256_of
from bitfold.numerics import Scheme
from bitfold.pipeline.quantize import Quantization, quantize
from bitfold.pipeline.taught import Taught
from bitfold.pipeline.workdir import finished_request, refuse_foreign
from bitfold.recipe import Recipe
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.device import quick_float32, resolve_device, resolve_dtype
from bitfold.runtime.load import load, load_tokenizer
from bitfold.training.beginning import begin_from, rounded_before, with_written
from bitfold.training.convert import quantized_weights
from bitfold.training.loop import Loop, LoopOptions, LoopResult, Progress
from bitfold.training.losses import next_token_loss, token_loss
from bitfold.training.preparation import preparation_of
from bitfold.training.prepare import prepare
from bitfold.training.text import held_back, text_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["METHODS_OF_MODELS", "QatOptions", "TrainedModel", "train_qat"]

METHODS_OF_MODELS = ("qat", "lsq", "twn", "ternary")
"""Of `bitfold.training.METHODS` those whose weights are integers, which artifacts and engines have."""
_TERNARY = ("twn", "ternary")
_REFERENCE_WIDTH = 4096


@dataclass(frozen=True)
class QatOptions:
    """method: how weights are trained through their rounding. start: the method of PTQ whose codes and scales it begins
    with, one that only rounds; rtn: the method's own start, and all that others than lsq have. scheme: notation, as of
    `bitfold quantize`; its inputs are rounded as they come. settings: `key=value` of the scheme, weight.symmetric=true
    say. steps, batch, accumulate: of the optimizer, windows in a step, pieces of them. rate: the highest; None: 2e-5 ·
    4096 / width of the model. sequence_length: of a window; None: the model's, at most 512. written: windows that a
    teacher writes itself, drawn as often as those of the text. teacher_weight: of KL(teacher ‖ student) in the loss.
    hold_back: the share of the text that the best state is chosen by; 0 keeps the last. seed: of all that is drawn.
    evaluate_windows: of the evaluation text, only the first so many.
    """

    method: str = "lsq"
    start: str = "quantease"
    scheme: str = "w4a16g128"
    settings: tuple[str, ...] = ()
    steps: int = 500
    batch: int = 8
    accumulate: int = 1
    rate: float | None = None
    sequence_length: int | None = None
    written: int = 512
    teacher_weight: float = 1.0
    hold_back: float = 0.05
    seed: int = 0
    evaluate_windows: int | None = None

    def __post_init__(self) -> None:
        """Refuse a method that has no artifact."""
        if self.method not in METHODS_OF_MODELS:
            raise RecipeError(
                f"'{self.method}' does not train language models: choose one of {', '.join(METHODS_OF_MODELS)}."
            )
        if not 0 <= self.teacher_weight <= 1:
            raise RecipeError(f"teacher_weight is a share from 0 to 1, not {self.teacher_weight}.")
        if self.written < 0:
            raise RecipeError(
                f"written is a number of windows, not {self.written}: give 0 for none."
            )
        self.loop(
            _REFERENCE_WIDTH
        )  # says what is wrong with steps, batch and rate before anything is read

    def loop(self, width: int) -> LoopOptions:
        """Of the shared training loop."""
        return LoopOptions(
            steps=self.steps,
            batch=self.batch,
            accumulate=self.accumulate,
            rate=2e-5 * _REFERENCE_WIDTH / width if self.rate is None else self.rate,
            seed=self.seed,
            keep="best" if self.hold_back > 0 else "last",
            looks=10,
        )


@dataclass(frozen=True)
class TrainedModel:
    """The artifact, and what training did: the loss on text that was held back before and after, in nats per token (KL
    to the teacher where it is guided by one); perplexity of the artifact on the evaluation text; trained: numbers that
    were."""

    artifact: Quantization
    method: str
    guided: bool
    steps: int
    kept: int
    resumed: int
    held_back_before: float | None
    held_back_after: float | None
    perplexity: float | None
    kl: float | None
    trained: int
    seconds: float
    peak_rss_mb: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"artifact": self.artifact.to_json(), "notes": list(self.notes)}


def train_qat(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    options: QatOptions | None = None,
    evaluation: str | Path | None = None,
    teacher: str | Path | None = None,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> TrainedModel:
    """Train an original checkpoint in few bits on a UTF-8 text, and write it as an artifact.

    model: the original. teacher: whose logits are imitated, usually the original itself. evaluation: a text on which
    the artifact is judged in the end. A killed run goes on where it last wrote its state, unless `resume` is false.

    >>> bitfold.train_qat("llama", "text.txt", "llama-w2", options=QatOptions(scheme="w2a16g64"), teacher="llama")
    ... # doctest: +SKIP

    Raises a BitfoldError, one clear sentence, for anything wrong with input, scheme or machine.
    """
    options = options or QatOptions()
    out, where = Path(out).expanduser().absolute(), resolve_device(device)
    refuse_foreign(out)
    if finished_request(out) is not None and not overwrite:
        raise OutputError(
            f"{out} holds an artifact: add --overwrite to replace it, or choose another -o."
        )
    base = find_checkpoint(model)
    stored = read_model(base)
    if stored.schemes or stored.loose:
        raise CheckpointError(
            f"{base} is quantized already: give the original, which training starts from."
        )
    recipe, start = _recipe(options), _start(options)
    tokenizer = load_tokenizer(base)
    student = load(base, device=where, dtype="float32").requires_grad_(False)
    length = options.sequence_length or default_sequence_length(student.config)
    rows = text_windows(text, tokenizer, length, vocab_size(student))
    rows, check = held_back(rows, options.hold_back, options.seed)
    guide = None if teacher is None else _teacher(teacher, base, student, where)
    storage = _storage(stored)
    parameters = _prepare(student, recipe.scheme, options, storage)
    place = _training_place(out, fresh=not resume)
    request = _request(base, Path(text), teacher, length, options)
    if start is not None:
        begun = place / f"start-{request[:16]}"
        try:
            begin_from(student, rounded_before(model, begun, start, rows, where, progress))
        except RecipeError:
            shutil.rmtree(place, ignore_errors=True)
            raise
    if guide is not None and options.written:
        rows = with_written(rows, guide, options.written, options.seed, progress)
    loop = _loop(student, guide, parameters, rows, check, options, where)
    loop.state, loop.request, loop.progress = place / "state.safetensors", request, progress
    with quick_float32() if where.type == "cpu" else nullcontext():
        run = loop.run()
    taught = _taught(student, parameters, run, options, storage, guided=guide is not None)
    del student
    artifact = quantize(
        str(model), out, recipe=recipe, device=where, overwrite=overwrite, resume=resume, taught=taught,
        progress=progress,
    )  # fmt: skip
    assert isinstance(artifact, Quantization)  # no dry run
    shutil.rmtree(place, ignore_errors=True)
    perplexity = kl = None
    if evaluation is not None:
        against = {} if guide is None else {"against": guide}
        found = evaluate(
            load(out, device=where), {"text": evaluation}, tokenizer=tokenizer, sequence_length=length,
            windows=options.evaluate_windows, **against,
        ).texts["text"]  # fmt: skip
        perplexity, kl = found.perplexity, found.kl_mean
    looks = dict(run.looks) if len(check) else {}
    return TrainedModel(
        artifact=artifact,
        method=options.method,
        guided=guide is not None,
        steps=len(run.losses),
        kept=run.kept,
        resumed=run.resumed,
        held_back_before=looks.get(0),
        held_back_after=looks.get(run.kept),
        perplexity=perplexity,
        kl=kl,
        trained=sum(one.numel() for one in parameters.values()),
        seconds=run.seconds,
        peak_rss_mb=peak_rss_mb(),
        notes=run.notes,
    )


def _recipe(options: QatOptions) -> Recipe:
    settings = list(options.settings)
    if options.method in _TERNARY:
        settings += ["weight.bits=2", "weight.symmetric=true", "weight.narrow=true"]
    recipe = Recipe.make("rtn", options.scheme, set=settings, seed=options.seed)
    scheme = recipe.scheme
    if scheme.weight is None:
        raise RecipeError(
            f"The scheme {options.scheme} leaves weights alone: choose one such as w4a16g128."
        )
    if scheme.quantizes_attention:
        raise RecipeError("Queries, keys and values are not trained: choose a scheme w…a….")
    if scheme.activation is not None and (scheme.activation.static or scheme.activation.calibrated):
        raise RecipeError(
            "Inputs are rounded as they come in training: leave out activation.static and clipped."
        )
    return recipe


def _start(options: QatOptions) -> Recipe | None:
    """The recipe of PTQ that training begins with, if any."""
    if options.method != "lsq" or options.start == "rtn":
        return None
    return Recipe.make(options.start, options.scheme, set=list(options.settings), seed=options.seed)


def _prepare(
    model: PreTrainedModel, scheme: Scheme, options: QatOptions, storage: torch.dtype
) -> dict[str, Tensor]:
    """Put fake quantization into the linear layers of the blocks; returns what is trained, by name."""
    head = model.get_output_embeddings()
    outside = [name for name, module in model.named_modules() if module is head]
    like = {"lsq": "lsq", "qat": "minmax", "twn": "twn", "ternary": "learned_ternary"}
    fields = {"weights": like[options.method], "inputs": "dynamic", "scheme": scheme}
    prepare(model, preparation_of(fields), ignore=outside, storage=storage)
    trained = ("weight", "bias", "step", "size", "threshold")
    embeddings = {
        id(module.weight) for module in (model.get_input_embeddings(), head) if module is not None
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            name.rpartition(".")[2] in trained and id(parameter) not in embeddings
        )
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def _storage(stored: StoredModel) -> torch.dtype:
    """In which the checkpoint's weights, and so the artifact's scales, are stored."""
    matrices = [one.dtype for one in stored.checkpoint.tensors.values() if len(one.shape) == 2]
    ((dtype, _),) = Counter(matrices).most_common(1) or [(torch.float32, 0)]
    return dtype


def _teacher(
    teacher: str | Path, base: Path, student: PreTrainedModel, device: torch.device
) -> PreTrainedModel:
    guide = load(teacher, device=device, dtype=resolve_dtype("auto", device)).requires_grad_(False)
    if vocab_size(guide) != vocab_size(student):
        raise DataError(
            f"The teacher has {vocab_size(guide)} tokens and {base} has {vocab_size(student)}: take the model it was "
            "made from."
        )
    return guide


def _loop(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    parameters: dict[str, Tensor],
    rows: Tensor,
    check: Tensor,
    options: QatOptions,
    device: torch.device,
) -> Loop:
    weight = options.teacher_weight if teacher is not None else 0.0

    def loss(ids: Tensor, share: float = weight) -> Tensor:
        ids = ids.to(device)
        guided = None
        if teacher is not None:
            with torch.no_grad():
                guided = teacher(input_ids=ids, use_cache=False).logits
        logits = student(input_ids=ids, use_cache=False).logits
        return (
            next_token_loss(logits, ids)
            if guided is None
            else token_loss(logits, ids, guided, share)
        )

    def judge() -> float:
        parts = check.split(options.batch)
        return sum(float(loss(part, 1.0)) * len(part) for part in parts) / len(check)

    checking: Callable[[], float] | None = judge if len(check) else None
    width = student.config.get_text_config().hidden_size
    return Loop(student, parameters, loss, rows, options.loop(width), check=checking)


def _taught(
    model: PreTrainedModel,
    parameters: dict[str, Tensor],
    run: LoopResult,
    options: QatOptions,
    storage: torch.dtype,
    *,
    guided: bool,
) -> Taught:
    weights = quantized_weights(model)
    plain = {
        name: parameter.detach().to(storage)
        for name, parameter in parameters.items()
        if ".weights." not in name and name.rpartition(".")[0] not in weights
    }
    plain |= {
        f"{name}.bias": parameters[f"{name}.bias"].detach().to(storage)
        for name in weights
        if f"{name}.bias" in parameters
    }
    counts = {
        "weights": sum(one.codes.numel() for one in weights.values()),
        "others": sum(one.numel() for one in plain.values()),
    }
    against = "KL to the teacher" if guided else "loss"
    looks = dict(run.looks)
    before, after = looks.get(0), looks.get(run.kept)
    said = (
        ""
        if before is None or after is None
        else f"; {against} on held-back text {before:.4f} → {after:.4f}"
    )
    note = f"Trained through rounding ({options.method}): {len(run.losses)} steps of {options.batch} windows{said}."
    entry = {
        "method": options.method,
        "trained": counts,
        "before": before,
        "after": after,
        "steps": len(run.losses),
        "kept": run.kept,
        "note": note,
        "notes": list(run.notes),
    }
    return Taught(weights, plain, entry)


def _training_place(out: Path, *, fresh: bool) -> Path:
    """The directory of a run's state, beside the artifact; it stays when a run is killed."""
    place = out.with_name(f".{out.name}.training")
    try:
        if fresh:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place} cannot be made ({error}): choose another -o.") from error
    return place


def _request(
    base: Path, text: Path, teacher: str | Path | None, length: int, options: QatOptions
) -> str:
    """A hash of all that the result follows from."""
    names = sorted(file.name for file in base.glob("*.safetensors"))
    sums = [sha256_of(base / name) for name in names]
    said = [sums, sha256_of(text), str(teacher), length, asdict(options)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
