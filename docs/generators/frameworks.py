"""The table of trainings through frameworks, from the stored runs in `benchmarks/results/frameworks.jsonl`."""

from __future__ import annotations

import statistics

from generators.stored import Row, block, by, caption, explained, mark, newest_commit, rows, seeds, spread, table

NAMES = {
    "text": "Transformers' Trainer: MiniLM on movie review sentences, 3 epochs",
    "lora": "Trainer and PEFT: LoRA on a Llama of 2 layers, digits as tokens, 12 epochs",
    "images": "Lightning: MLP on digits, 20 epochs",
}
FILE = "frameworks.jsonl"
ALONE = 0.9
"""The share of a CPU that a run of one thread must have had for its seconds to be shown."""


def _seconds(runs: list[Row]) -> str:
    alone = all(r["cpu_share"] >= ALONE * r["threads"] for r in runs)
    return f"{statistics.mean(r['seconds_compiled'] for r in runs):.0f}" if alone else "busy machine"


def _share(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]  # a count that was wrong when a run was stored is left out of its row
    return f"{100 * statistics.mean(known):.0f} %" if len(known) == len(values) else ""


def _line(name: str, runs: list[Row]) -> list[str]:
    exact, approx = ([r for r in runs if r["backend"] == backend] for backend in ("exact", "approx"))
    accuracies = [spread([100 * r["accuracy"] for r in group]) for group in (exact, approx)]
    shares = [_share([r[key] for r in approx]) for key in ("kept", "flops_saved")]
    accuracies[1] += mark(approx[0])
    return [NAMES[name], seeds(approx), *accuracies, _seconds(exact), _seconds(approx), *shares, runs[0]["commit"]]


def blocks() -> dict[str, str]:
    shown = {name: newest_commit(runs, "backend", "seed", least=2) for name, runs in by(rows(FILE), lambda r: r["work"]).items()}
    head = ("training", "seeds", "exact, %", "approx, %", "seconds, exact", "seconds, approx", "kept", "FLOPs saved", "commit")
    text = (
        "Test accuracy; seconds of training steps without compiling; the mean share of the samples, or tokens, that backward passes kept, and of the FLOPs "
        "left out."
    )
    every = [r for runs in shown.values() for r in runs]
    return {"frameworks": block(table(head, (_line(name, shown[name]) for name in NAMES if name in shown)), caption(explained(text, every), every, FILE))}
