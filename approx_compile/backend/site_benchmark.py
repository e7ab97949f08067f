"""One site alone, compiled and timed: a model of a single product, its forward and backward pass, exactly and sampled, in turn in one process."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from approx_compile.machine import float32_precision
from approx_compile.machine.site_timings import TimedProduct
from approx_compile.machine.timer import BenchmarkTimer


class Alone(nn.Module):
    """The product as a model: operands that are weights are parameters, the others are given."""

    def __init__(self, product: TimedProduct) -> None:
        super().__init__()
        self.product = product
        if product.weight is not None:
            self.weight = nn.Parameter(_operand(product, product.weight), requires_grad=product.needs_grad[product.weight])

    def given(self) -> list[Tensor]:
        return [_operand(self.product, i).requires_grad_(self.product.needs_grad[i]) for i in (0, 1) if i != self.product.weight]

    def forward(self, *given: Tensor) -> Tensor:
        operands = list(given)
        if self.product.weight is not None:
            operands.insert(self.product.weight, self.weight)
        if self.product.op == "convolution":
            out: Tensor = torch.ops.aten.convolution(*operands, None, *self.product.rest)
            return out
        return torch.mm(*operands) if self.product.op == "mm" else torch.bmm(*operands)


def _operand(product: TimedProduct, i: int) -> Tensor:
    shape, strides = product.layouts[i]
    made = torch.empty_strided(shape, strides, dtype=getattr(torch, product.dtype), device=product.device)
    return made.normal_(generator=torch.Generator(product.device).manual_seed(i))


Backend = str | Callable[..., Any]


def sampled(options: dict[str, Any]) -> Backend:
    """A backend with these options, which says nothing about it."""
    from approx_compile.backend import Backend as Approx  # which comes to ask for times itself

    return Approx(options, on_plan=lambda plan, before, after: None)


def step_of(product: TimedProduct, backend: Backend) -> Callable[[], None]:
    """A forward and backward pass of the product alone, compiled; gradients are dropped before each."""
    model = Alone(product)
    given = model.given()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        grad = torch.ones_like(model(*given))
    leaves = [t for t in (*given, *model.parameters()) if t.requires_grad]

    def step() -> None:
        for t in leaves:
            t.grad = None
        compiled(*given).backward(grad)

    return step


def times_us(product: TimedProduct, backends: Sequence[Backend], rounds: int = 7, least_s: float = 0.02) -> list[float]:
    """Microseconds of a step under each backend: the median of `rounds` rounds in which they take turns, for `least_s` each."""
    torch.compiler.reset()
    steps = [step_of(product, b) for b in backends]
    for step in steps:
        step()
    clock = BenchmarkTimer(product.device, least_s)
    calls = [clock.calls(step) for step in steps]
    found = [[clock.sample(step, n) * 1e6 for step, n in zip(steps, calls, strict=True)] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*found, strict=True)]


_EXACT = {"policy": "always", "method": "exact"}


def main() -> None:
    """The child: questions on stdin, their times on stdout."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    float32_precision.take_over(asked["precision"])
    found = []
    for q in asked["questions"]:
        given = q["product"]
        product = TimedProduct(**given | {k: _tuples(given[k]) for k in ("layouts", "needs_grad", "rest")})
        options = [_EXACT, *q["options"]]  # by the same backend, which allocates in its own way
        found.append(times_us(product, [sampled(o | {"huge_pages": q["huge_pages"]}) for o in options]))
    print(json.dumps(found))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
