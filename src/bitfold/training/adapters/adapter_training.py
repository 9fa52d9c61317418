"""Training of what stands beside a frozen base: one function for LoRA, biases, and both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitfold.data import default_sequence_length, read_text
from bitfold.errors import CheckpointError, DataError, OutputError
from bitfold.evaluate import evaluate
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.evaluate.models import check_positions, vocab_size
from bitfold.export.reading import read_model
from bitfold.models.checkpoint import sha256_of
from bitfold.numerics import Scheme
from bitfold.pipeline.workdir import MARKER, Workdir, finished_request, refuse_foreign, writing
from bitfold.runtime.adapted import (
    BIASES,
    LORA_CONFIG,
    LORA_WEIGHTS,
    MARK,
    AdapterFile,
    add_biases,
    base_sum,
    biases_of,
    is_adapter,
    peft_or_error,
    teach_peft,
)
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.device import quick_float32, resolve_device, resolve_dtype
from bitfold.runtime.frozen import FrozenLinear, load_frozen, on_load
from bitfold.runtime.load import load, load_tokenizer
from bitfold.runtime.loading import quiet
from bitfold.training.adapters.adapter_options import AdapterOptions, AdapterResult
from bitfold.training.loop import Loop, LoopResult, Progress
from bitfold.training.losses import token_loss
from bitfold.training.text import held_back, text_windows
from bitfold.version import VERSION

__all__ = ["train_adapter"]

_STATE = "training.safetensors"


@dataclass
class _Student:
    """The base with what is trained on it. parameters: by name, LoRA's first; starts: of the biases."""

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    biases: dict[str, nn.Parameter]
    starts: dict[str, Tensor]
    base_parameters: int
    base_bytes: int


def train_adapter(
    kinds: tuple[str, ...],
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    options: AdapterOptions,
    evaluation: str | Path | None = None,
    teacher: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> AdapterResult:
    """Train `kinds` (`lora`, `bitfit`) beside a frozen base on a text, and write them to a directory of their own.

    See `train_qlora` for what is given, and raised.
    """
    out = Path(out).expanduser().absolute()
    text = Path(text)
    _check_out(out, overwrite)
    if "lora" in kinds:
        peft_or_error()
    where = resolve_device(device)
    base = find_checkpoint(model, with_code=trust_remote_code)
    if is_adapter(base):
        raise CheckpointError(
            f"{base} is an adapter: give the base, or merge the adapter into it first (`bitfold train merge`)"
        )
    if out == base.absolute():
        raise OutputError(f"{out} is the base itself, which an adapter needs: choose another -o")
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    for one in [text, *([] if evaluation is None else [Path(evaluation)])]:
        read_text(one)
    notation = _scheme_of(base, options)
    said = base if Path(model).expanduser().is_dir() else str(model)
    file = AdapterFile(
        kinds,
        str(said.absolute()) if isinstance(said, Path) else said,
        base_sum(base),
        notation,
        options.double,
    )
    wanted = resolve_dtype(dtype, where)
    student = _prepare(kinds, base, file, options, where, wanted, trust_remote_code)
    length = options.length(default_sequence_length(student.model.config))
    check_positions(student.model, length)
    size = vocab_size(student.model)
    rows, check = held_back(
        text_windows(text, tokenizer, length, size), options.hold_back, options.seed
    )
    guide = None
    if teacher is not None:
        guide = load(teacher, device=where, dtype=dtype, trust_remote_code=trust_remote_code)
        guide.requires_grad_(False)
        if vocab_size(guide) != size:
            raise DataError(
                f"The teacher has {vocab_size(guide)} tokens and {base} has {size}: take the model it was made from"
            )

    def perplexity() -> float | None:
        if evaluation is None:
            return None
        if progress is not None:
            progress(0, options.steps, "evaluating")
        return _perplexity(student.model, Path(evaluation), tokenizer, length, options)

    request = _request(file, text, teacher, length, wanted, options)
    before = perplexity()
    with Workdir(out).opened(request) as workdir:
        if not resume:
            workdir.restart()
        loop = _loop(student, rows, check, guide, options, where)
        loop.state, loop.request, loop.progress = workdir.root / _STATE, request, progress
        with quick_float32() if where.type == "cpu" else nullcontext():
            run = loop.run()
        peak = peak_rss_mb()
        after = perplexity()
        judged = [value for _, value in run.looks] if len(check) else []
        trained = sum(parameter.numel() for parameter in student.parameters.values())
        figures = {
            "trained": trained,
            "share": trained / student.base_parameters,
            "steps": len(run.losses),
            "kept": run.kept,
            "text": str(text),
            "perplexity_before": before,
            "perplexity_after": after,
        }
        file.figures.update(figures | {"notes": list(run.notes)})
        with writing(out):
            _write(workdir, request, file, student)
        size_bytes = sum(one.stat().st_size for one in workdir.path.iterdir())
        workdir.publish()
    return AdapterResult(
        out=out,
        base=file.base,
        kinds=kinds,
        trained=trained,
        share=trained / student.base_parameters,
        steps=len(run.losses),
        kept=run.kept,
        resumed=run.resumed,
        first_loss=run.losses[0] if run.losses else None,
        last_loss=run.losses[-1] if run.losses else None,
        held_back_before=judged[0] if judged else None,
        held_back_after=_at(run, run.kept) if judged else None,
        perplexity_before=before,
        perplexity_after=after,
        base_bytes=student.base_bytes,
        size_bytes=size_bytes,
        peak_rss_mb=peak,
        seconds=run.seconds,
        notes=run.notes,
    )


def _check_out(out: Path, overwrite: bool) -> None:
    refuse_foreign(out)
    if finished_request(out) is not None and not overwrite:
        raise OutputError(f"{out} is there already: add --overwrite, or choose another -o")


def _scheme_of(base: Path, options: AdapterOptions) -> str | None:
    """In which an original is rounded as it is loaded; None for a base that is quantized already."""
    stored = read_model(base)
    if stored.schemes or stored.loose:
        if options.scheme is not None:
            # load_frozen says it in its words.
            return options.scheme
        return None
    return on_load(None if options.scheme is None else Scheme.parse(options.scheme)).notation


def _prepare(
    kinds: tuple[str, ...],
    base: Path,
    file: AdapterFile,
    options: AdapterOptions,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> _Student:
    model = load_frozen(
        base,
        device=device,
        dtype=dtype,
        scheme=None if file.scheme is None else Scheme.parse(file.scheme),
        double=options.double,
        trust_remote_code=trust_remote_code,
    )
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    packed = sum(module.in_features * module.out_features for module in frozen)
    count = packed + sum(parameter.numel() for parameter in model.parameters())
    held = sum(module.nbytes for module in frozen)
    student = _Student(model, {}, {}, {}, count, held)
    if "bitfit" in kinds:
        add_biases(model)
        # Names before LoRA, which hides the layers by theirs. Biases that train are float32, as LoRA's matrices are.
        for name, bias in biases_of(model).items():
            bias.data = bias.data.float() if bias.dtype != torch.float64 else bias.data
            student.biases[name] = bias
            student.starts[name] = bias.detach().clone()
    if "lora" in kinds:
        student.parameters |= _add_lora(model, file, options)
    for bias in student.biases.values():
        bias.requires_grad_(True)
    student.parameters |= student.biases
    return student


def _add_lora(
    model: PreTrainedModel, file: AdapterFile, options: AdapterOptions
) -> dict[str, nn.Parameter]:
    peft = peft_or_error()
    head = model.get_output_embeddings()
    layers = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | FrozenLinear) and module is not head
    ]
    unknown = [name for name in options.targets if name not in layers]
    if unknown:
        known = ", ".join(dict.fromkeys(layers))
        raise DataError(f"The model has no linear layer '{unknown[0]}': choose of {known}")
    config = teach_peft(
        peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=sorted({*(options.targets or layers)}),
            task_type="CAUSAL_LM",
            base_model_name_or_path=file.base,
        )
    )
    with torch.random.fork_rng(), quiet():  # of layers that it was taught a moment ago
        torch.manual_seed(options.seed)
        peft.inject_adapter_in_model(config, model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _loop(
    student: _Student,
    rows: Tensor,
    check: Tensor,
    teacher: PreTrainedModel | None,
    options: AdapterOptions,
    device: torch.device,
) -> Loop:
    model = student.model

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    def loss(ids: Tensor) -> Tensor:
        guided = None
        if teacher is not None:
            with torch.no_grad():
                guided = teacher(input_ids=ids, use_cache=False).logits
        return token_loss(logits(ids), ids, guided, options.teacher_weight)

    def judge() -> float:
        # By what is trained for: with a teacher the text's own likelihood may well rise.
        return sum(float(loss(ids)) * len(ids) for ids in check.split(options.batch)) / len(check)

    settings = options.loop(model.config.get_text_config().hidden_size)
    bias_rate = options.rates(model.config.get_text_config().hidden_size)[1]
    check = check.to(device)
    checking: Callable[[], float] | None = judge if len(check) else None
    return Loop(
        model,
        student.parameters,
        loss,
        rows.to(device),
        settings,
        check=checking,
        rates=dict.fromkeys(student.biases, bias_rate / settings.rate),
    )


def _perplexity(
    model: PreTrainedModel,
    file: Path,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    options: AdapterOptions,
) -> float | None:
    found = evaluate(
        model,
        {"text": file},
        tokenizer=tokenizer,
        sequence_length=length,
        windows=options.evaluate_windows,
    )
    return found.texts["text"].perplexity


def _request(
    file: AdapterFile,
    text: Path,
    teacher: str | Path | None,
    length: int,
    dtype: torch.dtype | str,
    options: AdapterOptions,
) -> str:
    """A hash of all that the result follows from."""
    teacher_sum = None if teacher is None else base_sum(find_checkpoint(teacher))
    of = [file.kinds, file.base_sum, file.scheme, sha256_of(text), teacher_sum, length, str(dtype)]
    content = json.dumps([VERSION, *of, asdict(options)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _write(workdir: Workdir, request: str, file: AdapterFile, student: _Student) -> None:
    if "lora" in file.kinds:
        peft = peft_or_error()
        tensors: dict[str, Tensor] = peft.get_peft_model_state_dict(student.model)
        # As peft names them in the model that it wraps round this one.
        named = {f"base_model.model.{name}": t.detach().float() for name, t in tensors.items()}
        workdir.write_tensors(LORA_WEIGHTS, named)
        config = student.model.peft_config["default"].to_dict()
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        config |= {"inference_mode": True}
        workdir.write_text(LORA_CONFIG, json.dumps(config, indent=2, default=str) + "\n")
    if student.biases:
        deltas = {
            name: (bias.detach() - student.starts[name]).float()
            for name, bias in student.biases.items()
        }
        workdir.write_tensors(BIASES, deltas)
    workdir.write_text(MARK, file.text())
    made: dict[str, Any] = {"bitfold": {"request": request, "version": VERSION}}
    workdir.write_text(MARKER, json.dumps(made, indent=2) + "\n")


def _at(run: LoopResult, step: int) -> float | None:
    return next((value for at, value in run.looks if at == step), None)
