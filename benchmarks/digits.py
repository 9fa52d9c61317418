"""A small convolutional network on scikit-learn's digits: PTQ, QAT, ternary and binary, and ZeroQ without data.

    python benchmarks/digits.py --seeds 5

Every figure is of the converted model, whose layers hold codes. A finished row is kept: the same command goes on where
it was stopped.
"""

import argparse
import copy
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
    from torch import Tensor, nn

EPOCHS, BATCH, CALIBRATION = 20, 64, 256
FLOAT = "fp32"


@dataclass(frozen=True)
class Way:
    """One row: how the trained network gets few bits. after: trained on, or only calibrated. signed: of the network
    whose activation has both signs, for layers that see signs. inputs: what it is calibrated on."""

    label: str
    recipe: str
    scheme: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True
    signed: bool = False
    rate: float = 1e-3
    inputs: str = "data"
    equalized: bool = False


EIGHT_AT_THE_ENDS = {"ends": "8 bits"}
PER_TENSOR = {"weight.granularity": "tensor"}
MSE = {"range": "mse"}
FULL_ENDS = {"ends": "full"}


def _static(label: str, scheme: str, **more: Any) -> Way:
    options = more.pop("options", {})
    options = options | ({} if scheme == "w8a8" else MSE)
    return Way(label, "static", scheme, options, trained=False, **more)


WAYS = [
    _static("PTQ int8, per channel", "w8a8"),
    _static("PTQ int8, per tensor", "w8a8", options=PER_TENSOR),
    _static("PTQ int4 weights, int8 inputs, per channel", "w4a8"),
    _static("PTQ int4 weights, int8 inputs, per tensor", "w4a8", options=PER_TENSOR),
    _static("the same, equalized", "w4a8", options=PER_TENSOR, equalized=True),
    _static("PTQ int4, per channel", "w4a4"),
    _static("PTQ int4, per tensor", "w4a4", options=PER_TENSOR),
    _static("ZeroQ's inputs: int4 weights, int8 inputs", "w4a8", inputs="distilled"),
    _static("ZeroQ's inputs and bits: 4 on average", "w4a8", inputs="distilled and bits"),
    Way("QAT min-max, 4 bits", "qat", "w4a4", EIGHT_AT_THE_ENDS),
    *(Way(f"LSQ, {n} bits", "lsq", f"w{n}a{n}", EIGHT_AT_THE_ENDS) for n in (4, 3, 2)),
    *(Way(f"PACT, {n} bits", "pact", f"w{n}a{n}", EIGHT_AT_THE_ENDS) for n in (4, 3, 2)),
    Way("DoReFa, 2 bits", "dorefa", "w2a2", EIGHT_AT_THE_ENDS),
    Way("TWN", "twn", None),
    Way("ternary, learned threshold", "ternary", None),
    Way("BinaryConnect", "binaryconnect", None),
    Way("BinaryConnect, stochastic", "binaryconnect", None, {"stochastic": True}),
    Way("binary weights with XNOR-Net's scales", "binary", None),
    Way("XNOR-Net", "xnor", None, FULL_ENDS, signed=True, rate=5e-3),
    Way("XNOR-Net without K", "xnor", None, FULL_ENDS | {"input_scaling": False}, signed=True, rate=5e-3),
    Way("BNN", "bnn", None, FULL_ENDS, signed=True, rate=5e-3),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="of the split, the network and the training")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/digits.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/digits"), help="without suffix")
    options = parser.parse_args()
    fix_environment(options.threads)
    finished = Rows(options.rows, ("seed", "way"))
    rows = []
    for seed in range(options.seeds):
        study = Study(seed)
        for label in (FLOAT, f"{FLOAT}, Hardtanh"):
            make = study.plain(signed=label != FLOAT)
            rows.append(finished.get({"seed": seed, "way": label}, make, f"{seed} {label}"))
        for way in WAYS:
            of = {"seed": seed, "way": way.label}
            rows.append(finished.get(of, study.measure(way), f"{seed} {way.label}"))
    command = command_line()
    write_results(options.out, {"command": command, "rows": rows}, page(rows, command))
    show_table(*table(rows))


class Study:
    """One seed: its split, and its trained networks, made when they are first needed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._networks: dict[bool, tuple[nn.Sequential, float]] = {}

    def plain(self, *, signed: bool) -> Callable[[], Row]:
        def make() -> Row:
            network, seconds = self._network(signed)
            return {"accuracy": self._accuracy(network), "seconds": seconds}

        return make

    def measure(self, way: Way) -> Callable[[], Row]:
        def make() -> Row:
            network, _ = self._network(way.signed)
            start = time.process_time()
            found = self._trained(network, way) if way.trained else self._calibrated(network, way)
            return {"accuracy": self._accuracy(found), "seconds": time.process_time() - start}

        return make

    def _trained(self, network: "nn.Sequential", way: Way) -> "nn.Module":
        import bitfold
        from bitfold import training

        model = copy.deepcopy(network)
        bitfold.prepare(model, way.recipe, scheme=way.scheme, options=way.options)
        self._train(model, way.rate)
        if way.options.get("stochastic"):
            training.estimate_batch_norms(model, self._data()[0].split(CALIBRATION))
        return bitfold.convert(model)

    def _calibrated(self, network: "nn.Sequential", way: Way) -> "nn.Module":
        import bitfold
        from bitfold import training

        model, (images, _, _, _) = copy.deepcopy(network), self._data()
        given, options = images[:CALIBRATION], dict(way.options)
        if way.inputs != "data":
            shape = (CALIBRATION, *images.shape[1:])
            given = training.distilled_inputs(model, shape, steps=200, seed=self._seed)
        training.fold_batch_norms(model)
        if way.equalized:
            training.equalize(model)
        if way.inputs == "distilled and bits":
            measured = training.sensitivities(model, given, (2, 3, 4, 6, 8))
            options["bits"] = training.bits_within(model, measured, 4.0)
        bitfold.prepare(model, way.recipe, scheme=way.scheme, options=options)
        bitfold.calibrate(model, given.split(BATCH))
        return bitfold.convert(model)

    def _network(self, signed: bool) -> "tuple[nn.Sequential, float]":
        if signed not in self._networks:
            import torch

            torch.manual_seed(self._seed)
            start = time.process_time()
            model = network_of(signed)
            self._train(model, 3e-3)
            self._networks[signed] = (model, time.process_time() - start)
        return self._networks[signed]

    def _train(self, model: "nn.Module", rate: float) -> None:
        import torch
        import torch.nn.functional as F

        import bitfold

        images, labels, _, _ = self._data()
        torch.manual_seed(self._seed)
        optimizer = torch.optim.Adam(model.parameters(), rate)
        steps = EPOCHS * -(-len(images) // BATCH)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(images)).split(BATCH):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                (loss + bitfold.penalty(model)).backward()
                optimizer.step()
                falling.step()
        model.eval()

    def _accuracy(self, model: "nn.Module") -> float:
        import torch

        _, _, images, labels = self._data()
        with torch.no_grad():
            return 100 * float((model(images).argmax(dim=1) == labels).float().mean())

    def _data(self) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
        """Images [n, 1, 8, 8] and labels to train on, three quarters, and to judge by."""
        import torch
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(
            images, labels, test_size=0.25, random_state=self._seed, stratify=labels
        )
        train, test = (
            torch.tensor(p, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for p in parts[:2]
        )
        return train, torch.tensor(parts[2]), test, torch.tensor(parts[3])


def network_of(signed: bool) -> "nn.Sequential":
    """Three convolutions with batch norms, and a linear layer: 15,248 weights."""
    from torch import nn

    def convolved(channels: int, out: int) -> list[nn.Module]:
        act: nn.Module = nn.Hardtanh() if signed else nn.ReLU()
        return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), act]

    pooled = [*convolved(16, 32), nn.MaxPool2d(2), *convolved(32, 32), nn.MaxPool2d(2)]
    return nn.Sequential(*convolved(1, 16), *pooled, nn.Flatten(), nn.Linear(128, 10))


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "accuracy", "± over seeds", "to fp32", "CPU s"]
    labels = list(dict.fromkeys(row["way"] for row in rows))
    by_label = {label: [row for row in rows if row["way"] == label] for label in labels}
    signed = {way.label for way in WAYS if way.signed}
    lines = []
    for label, own in by_label.items():
        like = f"{FLOAT}, Hardtanh" if label in signed else FLOAT
        pairs = zip(own, by_label[like], strict=True)
        differences = [row["accuracy"] - base["accuracy"] for row, base in pairs]
        found = [row["accuracy"] for row in own]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        seconds = statistics.mean(row["seconds"] for row in own)
        cells = [label, f"{statistics.mean(found):.2f} %", f"{spread:.2f}"]
        lines.append([*cells, f"{statistics.mean(differences):+.2f}", f"{seconds:.1f}"])
    return header, lines


def page(rows: list[Row], command: str) -> str:
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# A small convolutional network on scikit-learn's digits",
        "",
        f"Written by `{command}`.",
        "",
        provenance(rows),
        "",
        "1,797 images of 8 x 8, a quarter of them to judge by; three convolutions with batch norms and a linear "
        f"layer, 15,248 weights. Mean of {seeds} seeds, each with its own split, network and training; ±: the standard "
        "deviation over them. PTQ folds batch norms and is calibrated on 256 training images (ZeroQ: on none, but on "
        "inputs made of the batch norms' statistics); all else trains the fp32 network on for 20 epochs. `2 bits` are "
        "those of weights and inputs, with 8 in the first and the last layer; ternary and binary weights are those of "
        "all layers, with inputs in fp32; XNOR-Net and BNN have signs for inputs too, full first and last layers, and "
        "Hardtanh for ReLU (to fp32: of that network). Weights that were drawn in training are used without drawing, "
        "with statistics of batch norms that were taken anew. CPU s: of training or calibrating.",
        "",
        *markdown_table(*table(rows)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
