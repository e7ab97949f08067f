"""Train LoRA adapters of a small Llama with PEFT and Transformers' Trainer, exactly and with `ApproxCallback`: `python examples/finetune_lora.py --help`.

The task needs no download: scikit-learn's digits, read as sequences of 64 tokens (the brightness of the pixels). The base model is random and is frozen but
for the adapters, the embedding and the head; `--base` names a folder with a pretrained Llama in its place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from finetune_text import StepTimes
from framework_runs import BACKENDS, Run, show
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainingArguments

import approx_compile
from approx_compile.integrations.transformers import ApproxCallback


def lora(base: Path | None, width: int, layers: int) -> Any:
    if base is not None:
        model = LlamaForSequenceClassification.from_pretrained(base, num_labels=10, pad_token_id=17)  # no pixel has this value
    else:
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
        model = LlamaForSequenceClassification(LlamaConfig(vocab_size=18, pad_token_id=17, num_labels=10, **sizes))
    adapters = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear", modules_to_save=["embed_tokens", "score"])
    return get_peft_model(model, adapters)


def train(backend: str, seed: int, model: Any, parts: tuple[Any, Any], epochs: int, batch_size: int) -> Run:
    times = StepTimes()
    if backend == "exact":
        model.compile()
    with tempfile.TemporaryDirectory() as out:
        given = {
            "label_names": ["labels"],
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": 64,
            "learning_rate": 2e-3,
        }
        arguments = TrainingArguments(out, seed=seed, save_strategy="no", report_to=[], logging_steps=25, disable_tqdm=True, dataloader_drop_last=True, **given)
        callbacks = [times, *([ApproxCallback()] if backend == "approx" else [])]  # the lines that differ from exact training
        trainer = Trainer(model, arguments, None, *parts, callbacks=callbacks)
        trainer.train()
    values = approx_compile.metrics(model)
    return Run(backend, seed, accuracy(model, parts[1]), times.seconds, values["approx/kept_mean"], values["approx/flops_saved"])


@torch.no_grad()
def accuracy(model: Any, rows: list[dict[str, Any]]) -> float:
    model.eval()
    return sum(int((model(input_ids=torch.tensor([r["input_ids"]])).logits.argmax() == r["labels"]).item()) for r in rows) / len(rows)


def main(
    base: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with a pretrained Llama.")] = None,
    width: Annotated[int, typer.Option(min=16, help="The width of the random base model.")] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    limit: Annotated[int | None, typer.Option(min=20, help="Use the first so many images.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Add a JSON line for each run.")] = None,
) -> None:
    """Train the adapters exactly and approximately, with several seeds, and compare."""
    digits = load_digits()
    rows = [{"input_ids": pixels, "labels": int(label)} for pixels, label in zip(digits.data.astype(int).tolist(), digits.target, strict=True)][:limit]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    test = len(rows) // 5
    parts = [rows[i] for i in order[test:]], [rows[i] for i in order[:test]]
    runs = []
    for seed in range(seeds):
        for backend in BACKENDS:
            torch._dynamo.reset()
            torch.manual_seed(seed)
            runs.append(train(backend, seed, lora(base, width, layers), parts, epochs, batch_size))
    show(f"LoRA on Llama, {len(rows)} digits, {epochs} epochs", runs, out)


if __name__ == "__main__":
    typer.run(main)
