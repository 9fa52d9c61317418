"""After the last block: what stands beside the weights is written, and the artifact gets its name."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from bitfold.export.artifact import (
    copy_companions,
    index_json,
    model_card,
    package_versions,
    shard_name,
    tensor_sums,
)
from bitfold.models.checkpoint import sha256_of, tensor_bytes
from bitfold.pipeline.job import Job
from bitfold.pipeline.outer import outer_tensors
from bitfold.pipeline.probe import PROBE_FILE, Probe
from bitfold.pipeline.result import usage_lines
from bitfold.pipeline.workdir import MARKER, Workdir, writing
from bitfold.version import VERSION

__all__ = ["publish"]


def publish(
    job: Job,
    workdir: Workdir,
    probe: Probe,
    distance: dict[str, Any],
    learned: Mapping[str, Tensor],
) -> None:
    """Write config, index, recipe, report, checksums, card, tokenizer, probe and provenance, then rename.

    probe: the simulation's logits; distance: its distance to the original's; learned: what distillation put into the
    shards, by full name. The same request gives the same bytes,
    whether or not the run was interrupted: no times and no measurements of the machine are written.
    """
    plan, blocks = job.plan, workdir.blocks
    outer = outer_tensors(job.skeleton, plan, learned)
    shards = {shard_name(0, len(blocks) + 1): list(outer)}
    shards |= {block["shard"]: list(block["sums"]) for block in blocks}
    sums = tensor_sums(outer)
    for block in blocks:
        sums |= block["sums"]
    sums |= tensor_sums(learned)
    total_bytes = tensor_bytes(outer) + sum(block["bytes"] for block in blocks)
    report = _report(job, workdir, distance)
    quantization = plan.format.config(plan.layout, plan.choice)
    source_config = job.skeleton.checkpoint.config
    config = source_config | plan.format.extra_config(plan.layout, source_config)
    config |= {"quantization_config": quantization}
    if job.skeleton.unties:
        config |= {"tie_word_embeddings": False}
    usage = "\n".join(usage_lines(".", quantization))
    card = model_card(job.model, report["scheme"], report["method"], report, f"```\n{usage}\n```")

    workdir.write_text("config.json", _json(config))
    workdir.write_text("model.safetensors.index.json", index_json(shards, total_bytes))
    workdir.write_text("recipe.yaml", plan.recipe.to_yaml())
    workdir.write_text("report.json", _json(report))
    workdir.write_text("checksums.json", _json(sums))
    workdir.write_text("README.md", card)
    with writing(workdir.path):
        copy_companions(job.source, workdir.path)
        probe.save(workdir.path / PROBE_FILE)
    workdir.write_text(MARKER, _json(_provenance(job)))
    workdir.publish()


def _report(job: Job, workdir: Workdir, distance: dict[str, Any]) -> dict[str, Any]:
    blocks, bases, found = workdir.blocks, workdir.bases, workdir.distilled
    weights = sum(block["weights"] for block in blocks)
    bits = sum(block["bits"] for block in blocks)
    online = job.plan.online
    return {
        "method": job.plan.recipe.method
        if found is None
        else found.get("method", job.plan.recipe.method),
        "scheme": job.plan.recipe.scheme.notation + (" (mixed)" if job.allocation else ""),
        "bits_per_weight": bits / weights if weights else 16.0,
        **({} if online is None else {"online": online.to_json()}),
        "probe": distance,
        **({} if job.allocation is None else {"allocation": job.allocation}),
        **({} if bases is None else {"rotation": _without(bases, "sums", "notes")}),
        **({} if found is None else {"distillation": _without(found, "sums", "notes")}),
        "fits": [block["fits"] for block in blocks if block["fits"]],
        "folding_errors": [block["folding_error"] for block in blocks],
        "layers": [layer for block in blocks for layer in block["layers"]],
        "notes": [
            *job.notes,
            *_data_free(job, distance),
            *([] if bases is None else [bases["note"], *bases["notes"]]),
            *(note for block in blocks for note in block["notes"]),
            *([] if found is None else [found["note"], *found["notes"]]),
        ],
    }


def _data_free(job: Job, distance: dict[str, Any]) -> list[str]:
    """What it cost that no real text was calibrated on."""
    if job.calibration is None or not job.calibration.data_free:
        return []
    real, own = distance["kl_by_window"]
    length = job.probe.shape[1]
    return [
        f"Calibrated without text, on {job.calibration.source}: the KL on {length} tokens of real text (the embedded "
        f"excerpt) is {real:.4f}, on as many of its own {own:.4f}; with text of your use it may be lower."
    ]


def _without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def _provenance(job: Job) -> dict[str, Any]:
    """What the artifact was made from."""
    files = job.skeleton.checkpoint.files
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(sha256_of, files))
    calibration = job.calibration
    return {
        "bitfold": {"version": VERSION, "request": job.request},
        "packages": package_versions(),
        "source": {
            "model": job.model,
            "files": {file.name: digest for file, digest in zip(files, sums, strict=True)},
            "config": hashlib.sha256((job.source / "config.json").read_bytes()).hexdigest(),
        },
        "calibration": None
        if calibration is None
        else {
            "source": calibration.source,
            "sha256": calibration.sha256,
            "samples": calibration.tokens.shape[0],
            "sequence_length": calibration.tokens.shape[1],
        },
        "seed": job.plan.recipe.seed,
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": job.skeleton.device.type,
    }


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
