"""Transformers' Trainer with `ApproxCallback`: the recipe of the documentation against the real Trainer, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import approx_compile
from approx_compile import Backend, controls
from approx_compile.backend import run_as_is

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from approx_compile.integrations.transformers import ApproxCallback  # noqa: E402

pytestmark = [pytest.mark.integrations, pytest.mark.usefixtures("one_thread", "small_work_counts")]

EAGER_TO_DROP: dict[str, Any] = {"adaptive": {"tau": 10.0}}
"""Settings under which the share of the rows falls within a few steps."""


def backend(options: Any = EAGER_TO_DROP) -> Backend:
    return Backend(options, inner_compile=run_as_is)


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, num_labels=2
    )
    return transformers.BertForSequenceClassification(config)


class Tiny(nn.Module):
    """A classifier of the mean of the words, as the Trainer takes one: it returns its loss. It compiles in a fraction of a transformer's time."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix, self.head = nn.Embedding(60, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = attention_mask.float().unsqueeze(-1)
        h = (torch.relu(self.mix(self.embed(input_ids))) * weights).sum(1) / weights.sum(1)
        logits = self.head(h)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def sentences(count: int = 64, length: int | None = 8) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        n = length or int(torch.randint(4, 14, (), generator=g))
        rows.append({"input_ids": torch.randint(0, 60, (n,), generator=g).tolist(), "labels": i % 2})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(r["input_ids"]) for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (longest - len(r["input_ids"])) for r in rows])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([r["labels"] for r in rows])}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 16, "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    return TrainingArguments(str(folder), use_cpu=True, learning_rate=1e-3, seed=3, **(given | changes))


def trained(folder: Path, callback: TrainerCallback, resume: str | None = None, model: nn.Module | None = None, **changes: Any) -> Trainer:
    torch._dynamo.reset()
    trainer = Trainer(model=model or classifier(), args=arguments(folder, **changes), train_dataset=sentences(), data_collator=padded, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("make", [Tiny, pytest.param(classifier, marks=pytest.mark.exhaustive)])
def test_a_resumed_run_repeats_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    whole = trained(tmp_path, ApproxCallback(backend()), model=make(), max_steps=24, save_strategy="steps", save_steps=12)
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["stateful_callbacks"]["ApproxCallback"]["attributes"]["saved"]
    assert saved["clocks"][0]["step"] == 12 and saved["controls"]
    after = approx_compile.state_dict(whole.model)  # a later seed restarts the draws
    resumed = trained(tmp_path, ApproxCallback(backend()), resume=str(tmp_path / "checkpoint-12"), model=make(5), max_steps=24)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry and entry["step"] > 12] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    assert after == approx_compile.state_dict(resumed.model)
    assert min(c.ratio for c in controls(resumed.model).values()) < 1


class Written(TrainerCallback):
    """Stands for a callback that writes logs, as those that `report_to` asks for: it comes first in the list."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


@pytest.mark.slow
def test_logs_come_before_other_callbacks_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's callback is made before the user's, too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    written = Written()
    torch._dynamo.reset()
    callbacks = [written, ApproxCallback(backend(), log_every=2)]
    trainer = Trainer(Tiny(), arguments(tmp_path, logging_steps=3, report_to=["tensorboard"]), padded, sentences(), callbacks=callbacks)
    trainer.train()
    names = {"approx/kept", "approx/flops_saved", "approx/seconds"}
    assert [names <= logs.keys() for logs in written.logs] == [True, False, True, True]  # steps 2, 3, 4 and the end
    assert names <= trainer.state.log_history[0].keys()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    assert {event.step for event in events.Scalars("train/approx/kept")} == {2, 4}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["accumulation", "bf16", "checkpointing", "loss function"])
def test_what_trainers_are_used_with(how: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "accumulation": {"gradient_accumulation_steps": 2},
        "bf16": {"bf16": True},
        "checkpointing": {"gradient_checkpointing": True},
    }.get(how, {})
    torch._dynamo.reset()

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)

    model = classifier()
    function = {"compute_loss_func": loss} if how == "loss function" else {}
    trainer = Trainer(model, arguments(tmp_path, **changes), padded, sentences(length=None), callbacks=[ApproxCallback(backend())], **function)
    trainer.train()
    found = controls(model).values()  # one for each region of tokens; one for the samples where layers are checkpointed
    assert {(c.step, c.passes) for c in found} == {(4, 8 if how == "accumulation" else 4)}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    model = peft.get_peft_model(classifier(), peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    trained(tmp_path, ApproxCallback(backend()), model=model)
    found = controls(model)
    assert {c.step for c in found.values()} == {4} and not any(name.startswith("base_model") for name in found)
    assert approx_compile.metrics(model)["approx/step"] == 4


@pytest.mark.slow
@pytest.mark.exhaustive
def test_sequence_to_sequence(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids"][:4]} for r in sentences()]
    given = dict(per_device_train_batch_size=16, max_steps=3, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=3)
    trainer = transformers.Seq2SeqTrainer(
        model, transformers.Seq2SeqTrainingArguments(str(tmp_path), **given), padded, rows, callbacks=[ApproxCallback(backend())]
    )
    trainer.train()
    assert approx_compile.metrics(model)["approx/step"] == 3


@pytest.mark.parametrize("wrong", [0, True, 1.5])
def test_wrong_arguments(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"log_every: got .*a number of optimizer steps"):
        ApproxCallback(log_every=wrong)
    with pytest.raises(approx_compile.ConfigError):
        ApproxCallback({"no such key": 1})
