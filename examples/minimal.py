"""Train a classifier with torch.compile's Inductor, then with one line changed, and print what was sampled: `python examples/minimal.py`."""

import statistics
import time

import torch
from torch import nn

import approx_compile


def train(backend: str, steps: int = 150) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer, centres, times = torch.optim.Adam(model.parameters(), fused=True), torch.randn(10, 512), []
    compiled = torch.compile(model, backend=backend)  # the one line: "approx" in place of "inductor"
    for _ in range(steps):
        y = torch.randint(10, (256,))
        x, start = centres[y] + 4 * torch.randn(256, 512), time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    print(approx_compile.decisions(model) if backend == "approx" else "Inductor: every backward pass on the whole batch")
    return statistics.median(times[steps // 2 :])  # milliseconds of a step, once few samples still matter


inductor, approx = train("inductor"), train("approx")
print(f"A training step: Inductor {inductor:.1f} ms, approx {approx:.1f} ms, {inductor / approx:.2f} times as fast")
