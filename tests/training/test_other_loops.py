"""Prepared models are trained by others' loops: transformers' Trainer and accelerate, with checkpoints that resume."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import bitfold
from bitfold.runtime.quantized_linear import QuantizedLinear

SENTENCES = 48


def _encoder() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _sentences() -> list[dict[str, Tensor]]:
    """Ids of which the first says the label."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (SENTENCES, 10), generator=draw)
    ids[:, 0] = torch.arange(SENTENCES) % 2
    mask = torch.ones_like(ids)
    return [
        {"input_ids": row, "attention_mask": m, "labels": row[0]}
        for row, m in zip(ids, mask, strict=True)
    ]


def _trainer(model: nn.Module, out: Path, steps: int, **more: object) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=3e-3,
        gradient_accumulation_steps=2, report_to=[], save_steps=10, logging_steps=1, use_cpu=True,
        disable_tqdm=True, lr_scheduler_type="constant", **more,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=_sentences())


@pytest.mark.parametrize(
    ("method", "scheme"), [("lsq", "w2a8"), ("qat", "w4a8"), ("ternary", None)]
)
def test_trainer_learns_and_resumes(method: str, scheme: str | None, tmp_path: Path) -> None:
    model = bitfold.prepare(_encoder(), method, scheme=scheme)
    trainer = _trainer(model, tmp_path, 20)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    resumed = _trainer(bitfold.prepare(_encoder(), method, scheme=scheme), tmp_path, 20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    wanted, found = model.state_dict(), resumed.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    batch = {name: torch.stack([row[name] for row in _sentences()]) for name in _sentences()[0]}
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        converted = bitfold.convert(model)
        assert torch.allclose(converted(**batch).logits, trained, atol=1e-5)
    assert any(isinstance(module, QuantizedLinear) for module in converted.modules())


def test_accelerate_trains_what_a_plain_loop_does(tmp_path: Path) -> None:
    """With gradients accumulated over two batches, saved and loaded in the middle."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, (x.sum(dim=1) > 0).long())

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        bitfold.prepare(model, "lsq", scheme="w3a4")
        return model, torch.optim.SGD(model.parameters(), 0.1)

    plain, optimizer = made()
    for _ in range(4):
        for index, (inputs, labels) in enumerate(DataLoader(data, batch_size=8)):
            (nn.functional.cross_entropy(plain(inputs), labels) / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(DataLoader(data, batch_size=8))

    def epochs(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(inputs), labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    model, optimizer = accelerator.prepare(*made())
    epochs(model, optimizer, 2)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    accelerator.load_state(str(tmp_path))
    epochs(model, optimizer, 2)
    for name, value in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name].float(), value.float(), atol=1e-6), name
