"""Time single sites in the child process behind `policy: measure`, run as `python -m approx_compile.backend.site_benchmark`.

Each site becomes a model with a single product. Its forward and backward pass is compiled exactly and with each of the given options, and these steps are
timed in turn in one process. `approx_compile.machine.site_timings` is the side of the parent process.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from approx_compile.backend.approx_backend import Backend
from approx_compile.machine import float32_precision
from approx_compile.machine.site_timings import TimedProduct
from approx_compile.machine.timer import BenchmarkTimer

BackendSpec = str | Callable[..., Any]
"""The type of the argument `backend` of `torch.compile`."""

EXACT_OPTIONS = {"policy": "always", "method": "exact"}


class SingleProduct(nn.Module):
    """A model that computes a single product. Its operand that is a weight becomes a parameter; the others are inputs.

    Args:
        product: The product to compute.
    """

    def __init__(self, product: TimedProduct) -> None:
        super().__init__()
        self.product = product
        if product.weight is not None:
            self.weight = nn.Parameter(_operand(product, product.weight), requires_grad=product.needs_grad[product.weight])

    def given(self) -> list[Tensor]:
        """Make the inputs, which are the operands that are not weights.

        Returns:
            Random tensors with the product's shapes and strides, the same at every call.
        """
        return [_operand(self.product, i).requires_grad_(self.product.needs_grad[i]) for i in (0, 1) if i != self.product.weight]

    def forward(self, *given: Tensor) -> Tensor:
        """Compute the product.

        Args:
            *given: The inputs, as `given()` makes them.

        Returns:
            The product's output.
        """
        operands = list(given)
        if self.product.weight is not None:
            operands.insert(self.product.weight, self.weight)
        if self.product.op == "convolution":
            out: Tensor = torch.ops.aten.convolution(*operands, None, *self.product.rest)
            return out
        return torch.mm(*operands) if self.product.op == "mm" else torch.bmm(*operands)


def _operand(product: TimedProduct, i: int) -> Tensor:
    shape, strides = product.layouts[i]
    tensor = torch.empty_strided(shape, strides, dtype=getattr(torch, product.dtype), device=product.device)
    return tensor.normal_(generator=torch.Generator(product.device).manual_seed(i))


def silent_backend(options: dict[str, Any]) -> Backend:
    """Make a backend that gives the user no notices.

    Args:
        options: The keys of `ApproxConfig`.

    Returns:
        The backend.
    """
    return Backend(options, on_plan=lambda plan, before, after: None)


def training_step(product: TimedProduct, backend: BackendSpec) -> Callable[[], None]:
    """Compile the forward and backward pass of a single product.

    Args:
        product: The product.
        backend: The backend to compile it with.

    Returns:
        A function that makes one step; gradients are dropped before each.
    """
    model = SingleProduct(product)
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


def times_us(product: TimedProduct, backends: Sequence[BackendSpec], rounds: int = 7, least_s: float = 0.02) -> list[float]:
    """Time the step of a product under several backends, which take turns.

    Args:
        product: The product.
        backends: The backends to compare.
        rounds: The number of turns of each backend.
        least_s: The approximate duration of a turn in seconds.

    Returns:
        Microseconds of a step under each backend: the median over the rounds.
    """
    torch.compiler.reset()
    steps = [training_step(product, b) for b in backends]
    for step in steps:
        step()
    timer = BenchmarkTimer(product.device, least_s)
    calls = [timer.calls(step) for step in steps]
    seconds = itertools.islice(timer.in_turn(steps, calls), rounds)
    return [statistics.median(column) * 1e6 for column in zip(*seconds, strict=True)]


def main() -> None:
    """Read the requests as JSON from stdin, and print their times as JSON to stdout."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    float32_precision.take_over(asked["precision"])
    times = []
    for request in asked["questions"]:
        fields = request["product"]
        product = TimedProduct(**fields | {k: _to_tuples(fields[k]) for k in ("layouts", "needs_grad", "rest")})
        options = [EXACT_OPTIONS, *request["options"]]  # the exact step uses this backend too, because the backend has its own way of allocating memory
        times.append(times_us(product, [silent_backend(o | {"huge_pages": request["huge_pages"]}) for o in options]))
    print(json.dumps(times))


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
