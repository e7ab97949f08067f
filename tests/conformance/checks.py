"""What is checked of one model, in a process of its own: each check gives a number or a sentence, and none stops the others.

The reference is eager. "lin": with the rows and weights that the backend chose, its gradients are those of the exact model whose gradient at the cut is
multiplied by the weights. "mean": over four choices of half the rows, drawn with probabilities that give every row its weight, the gradients' mean is the
exact gradient, whatever lies above and below the cut; something that is not linear in the gradient shows here and nowhere else. "torch", where the limit of
rounding is missed: the error of torch's own compilation op by op, whose decompositions of ops round otherwise than eager does.
"""

from __future__ import annotations

import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import decide
import models
import table
import torch
from decide import BATCH
from models import Model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import approx_compile
from approx_compile.rows import row_backward

HALF: dict[str, Any] = {"policy": "always", "grad": {"axis": "rows", "ratio": 0.5}}
OTHER_SIZES = (BATCH + 4, BATCH, 5)
"""After the first batch: a larger one, the first size again, and the few samples at the end of an epoch."""
Gradients = dict[str, Tensor]


# --- models, data, gradients ---


def prepared(entry: Model, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = models.without_dropout(entry.make()).to(dtype).train()
    for m in model.modules():
        for name, value in list(m.__dict__.items()):
            if isinstance(value, Tensor) and value.is_floating_point():  # a constant that is no buffer
                setattr(m, name, value.to(dtype))
    return model


def batch(entry: Model, n: int, dtype: torch.dtype) -> models.Data:
    torch.manual_seed(n)
    cast: Callable[[Any], Any] = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    data = entry.data(n)
    return {k: cast(v) for k, v in data.items()} if isinstance(data, dict) else tuple(map(cast, data))


def tangent(entry: Model, like: Tensor) -> Tensor:
    """A random gradient for the output, some samples' much larger than others'."""
    torch.manual_seed(7)
    sizes = [-1 if d == entry.axis else 1 for d in range(like.dim())]
    return torch.randn_like(like) * torch.rand(like.shape[entry.axis], dtype=like.dtype).view(sizes) ** 3


def gradients(entry: Model, model: nn.Module, f: Callable[..., Any], data: models.Data, weights: Tensor | None = None) -> Gradients:
    """Of the mean loss, or of a random gradient of the output (times `weights` by sample); zeros where there is none."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    result = models.out(models.run(f, data), entry.loss)
    if entry.loss:
        result.backward()
    else:
        given = tangent(entry, result)
        axis = entry.axis if weights is None or given.shape[entry.axis] == len(weights) else 0  # rows may have been found along another axis
        result.backward(given if weights is None else given * spread(weights, given, axis))
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def spread(weights: Tensor, like: Tensor, axis: int = 0) -> Tensor:
    """A weight per sample for every entry of a tensor that holds samples, tokens perhaps with them, along `axis`."""
    if like.shape[axis] % len(weights):
        raise NotChecked(f"{like.shape[axis]} entries of {len(weights)} samples")
    each = weights.repeat_interleave(like.shape[axis] // len(weights)).to(like.dtype)
    return each.view([-1 if d == axis else 1 for d in range(like.dim())])


def error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and whose. What is small beside the others' (keys' biases, whose gradient is zero but for
    rounding) is compared with a hundredth of their root mean square."""
    norms = {n: w.double().norm() for n, w in want.items()}
    floor = 0.01 * (sum(v**2 for v in norms.values()) / len(norms)) ** 0.5 + 1e-30
    errors = {n: ((got[n].double() - w.double()).norm() / max(norms[n], floor)).item() for n, w in want.items()}
    worst = max(errors, key=lambda n: float("inf") if errors[n] != errors[n] else errors[n])
    return errors[worst], worst


class NotChecked(Exception):
    """The check does not apply here; the message says why."""


class Chosen:
    """In place of `choose_rows`: what it chose, or rows that are given to it."""

    def __init__(self) -> None:
        self.plain = row_backward.choose_rows
        self.found: list[tuple[Tensor, Tensor | None, int]] = []
        self.given: Tensor | None = None
        row_backward.choose_rows = self

    def __call__(self, method: str, norms_sq: Tensor, k: int, random: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        if self.given is None:
            idx, weight = self.plain(method, norms_sq, k, random)
        else:
            if len(norms_sq) != len(self.given) or k != int((self.given != 0).sum()):
                raise NotChecked(f"{k} rows of {len(norms_sq)} are kept")
            (idx,) = self.given.nonzero(as_tuple=True)
            weight = self.given[idx].to(norms_sq.dtype)
        self.found.append((idx, weight, len(norms_sq)))
        return idx, weight

    def weights(self) -> Tensor:
        """Of all samples, zero for those left out, where one choice was made."""
        if len(self.found) > 1:
            raise NotChecked(f"{len(self.found)} choices of rows in one backward pass")
        idx, weight, size = self.found[0]
        weight = torch.ones(len(idx), dtype=torch.float64) if weight is None else weight.double()
        return torch.zeros(size, dtype=torch.float64).index_copy_(0, idx, weight)


def torch_error(entry: Model, model: nn.Module, data: models.Data) -> tuple[float, str]:
    """The error of torch's own compilation op by op."""
    decide.fresh()
    got = gradients(entry, model, torch.compile(model, backend="aot_eager_decomp_partition"), data)
    return error(got, gradients(entry, model, model, data))


# --- the checks ---


def default(entry: Model) -> dict[str, Any]:
    """The one line: while it keeps all rows the gradients are eager's, for batches of other sizes too; and how many graphs are compiled for those, beside
    torch's own number."""
    dtype, counts = torch.float32, torch._dynamo.utils.counters["stats"]

    def graphs_added(f: Callable[..., Any], model: nn.Module, compared: bool) -> int:
        found.update({"default fp32": (0.0, ""), "other sizes": (0.0, "")} if compared else {})
        before = 0
        for i, n in enumerate((BATCH, *OTHER_SIZES)):
            data = batch(entry, n, dtype)
            with row_backward.all_rows() if i else nullcontext():
                got = gradients(entry, model, f, data)
            if compared:
                key = "other sizes" if i else "default fp32"
                found[key] = max(found[key], error(got, gradients(entry, model, model, data)))
            before = before if i else counts["unique_graphs"]
        return counts["unique_graphs"] - before

    found: dict[str, Any] = {}
    decide.fresh()
    model = prepared(entry, dtype)
    found["recompiled"] = graphs_added(decide.compiled(model, None, decide.Watched()), model, True)
    if found["other sizes"][0] > table.LIMITS["fp32"]:
        found["torch other sizes"] = max(torch_error(entry, model, batch(entry, n, dtype)) for n in OTHER_SIZES)
    decide.fresh()
    model = prepared(entry, dtype)
    found["recompiled by torch"] = attempted(lambda: graphs_added(torch.compile(model, backend="aot_eager"), model, False))
    return found


def sampled(entry: Model, dtype: torch.dtype) -> dict[str, Any]:
    """With half the rows: `lin`, `mean`, the same code on all rows, and traces left in the user's world."""
    decide.fresh()
    model = prepared(entry, dtype)
    data = batch(entry, BATCH, dtype)
    tensors = [v for v in (data.values() if isinstance(data, dict) else data) if isinstance(v, Tensor)]
    want = gradients(entry, model, model, data)
    random = torch.get_rng_state()
    chosen = Chosen()
    found: dict[str, Any] = {}
    try:
        f = decide.compiled(model, HALF, decide.Watched())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got = gradients(entry, model, f, data)
        found["random stream"] = "as eager" if torch.equal(random, torch.get_rng_state()) else "changed"
        home = os.path.dirname(approx_compile.__file__)
        ours = [f"{os.path.basename(w.filename)}:{w.lineno} {str(w.message)[:200]}" for w in told if w.filename.startswith(home)]
        found["warnings"] = "; ".join(w for w in ours if " approx: " not in w) or "none"
        found["marks"] = ", ".join(sorted({k for t in tensors for k in vars(t)})) or "none"
        if not chosen.found:
            found["lin"] = found["mean"] = "no rows left out"
            found["exact"] = error(got, want)
            return found
        with row_backward.all_rows():
            found["exact"] = error(gradients(entry, model, f, data), want)
        found["kept"] = f"{len(chosen.found[0][0])} of {chosen.found[0][2]}"
        found["lin"] = attempted(lambda: lin(entry, model, data, got, want, chosen.weights()))
        found["mean"] = attempted(lambda: mean(entry, model, f, data, want, chosen))
        if isinstance(found["lin"], tuple) and found["lin"][0] > 1e-3 and isinstance(found["mean"], tuple) and found["mean"][0] < 0.03 * found["lin"][0]:
            place = "the last layer" if entry.loss else "the output"
            found["lin"] = f"not checked: rows are chosen elsewhere than at {place} ({found['lin'][0]:.1e} at {found['lin'][1]}), and their mean is right"
        if found["exact"][0] > table.LIMITS[str(dtype).replace("torch.float", "fp")]:
            found["torch"] = torch_error(entry, model, data)
        return found
    finally:
        row_backward.choose_rows = chosen.plain


def attempted(check: Callable[[], Any]) -> Any:
    try:
        return check()
    except NotChecked as e:
        return f"not checked: {e}"
    except Exception as e:
        return f"raises {type(e).__name__}: {str(e)[:300]}"


def lin(entry: Model, model: nn.Module, data: models.Data, got: Gradients, want: Gradients, weights: Tensor) -> tuple[float, str]:
    """Against the eager model with the weights on its output's gradient; with a loss inside, on that of its last layer's output."""
    if not entry.loss:
        return error(got, gradients(entry, model, model, data, weights))
    name, last = last_layer(entry, model, data)
    hook = last.register_forward_hook(lambda m, given, result: result.register_hook(lambda g: g * spread(weights, g)) and None)
    try:
        masked = gradients(entry, model, model, data)
    finally:
        hook.remove()
    bias = f"{name}.bias"
    if bias in got and error({bias: got[bias]}, {bias: want[bias]})[0] < 1e-4:
        masked[bias] = want[bias]  # a sum of the gradient above the cut
    return error(got, masked)


def last_layer(entry: Model, model: nn.Module, data: models.Data) -> tuple[str, nn.Module]:
    """The product that ran last."""
    ran: list[tuple[str, nn.Module]] = []
    hooks = []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d):
            hooks.append(m.register_forward_hook(lambda m, given, result, name=name: ran.append((name, m))))
    models.run(model, data)
    for hook in hooks:
        hook.remove()
    if not ran:
        raise NotChecked("there is no last layer")
    return ran[-1]


def mean(entry: Model, model: nn.Module, f: Callable[..., Any], data: models.Data, want: Gradients, chosen: Chosen) -> tuple[float, str]:
    """Two halves of the rows and two others, drawn with different probabilities; a row's weight is one over its probability."""
    size = chosen.found[0][2]
    if len(chosen.found) > 1:
        raise NotChecked(f"{len(chosen.found)} choices of rows in one backward pass")
    torch.manual_seed(3)
    members = [torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.randperm(size)[: size // 2], True) for _ in range(2)]
    sets = [(0.1, members[0]), (0.3, ~members[0]), (0.2, members[1]), (0.4, ~members[1])]
    inclusion = sum(p * s.double() for p, s in sets)
    total = {n: torch.zeros_like(w) for n, w in want.items()}
    for p, s in sets:
        chosen.given = torch.where(s, 1 / inclusion, 0.0)
        for n, g in gradients(entry, model, f, data).items():
            total[n] += p * g
    return error(total, want)


class _Narrow(TorchDispatchMode):
    """Whether something is computed in less than double precision."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= isinstance(result, Tensor) and result.is_floating_point() and result.dtype != torch.float64
        return result


def narrow(entry: Model) -> bool:
    model, data = prepared(entry, torch.float64), batch(entry, BATCH, torch.float64)
    with _Narrow() as mode:
        gradients(entry, model, model, data)
    return mode.found


def _processor_seconds() -> float:
    """What this process and the processes it has waited for have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def first_call(entry: Model, name: str) -> dict[str, Any]:
    """The first step with generated code, nothing cached, on one thread; and whether its gradients are right.

    Seconds are those of the processor, the compiler's processes included, so that they do not depend on what else the machine does.
    """
    from torch._inductor.utils import fresh_cache

    decide.fresh()
    torch.compile(lambda x: (x.sin() @ x).sum(), backend="inductor")(torch.randn(4, 4, requires_grad=True)).backward()  # what is loaded once
    decide.fresh()
    model, data = prepared(entry, torch.float32), batch(entry, BATCH, torch.float32)
    want = gradients(entry, model, model, data)
    with fresh_cache(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = _processor_seconds()
        got = gradients(entry, model, torch.compile(model, backend=name), data)
        seconds = _processor_seconds() - start
    return {f"{name} first call": round(seconds, 1), f"{name} gradients": error(got, want)}


def decision(entry: Model) -> dict[str, Any]:
    found = decide.decide(entry)
    return {"decision": found.decision, "share": round(found.share, 3), "reason": found.reason, "graphs": found.graphs, "ops": found.ops}


def on_tokens(entry: Model) -> dict[str, Any]:
    """The gradients on tokens, region by region, in double precision."""
    import tokens

    return tokens.check(entry, torch.float64)


def axis(entry: Model) -> dict[str, Any]:
    """What the one line chooses, samples or tokens, and the share of the backward pass's FLOPs on them."""
    decide.fresh()
    watched = decide.Watched()
    models.run(decide.compiled(entry.make().train(), None, watched), entry.data(BATCH))
    on = [c for plan in watched.plans for c in plan.cuts if c.decision == "rows"]
    total = sum(plan.cuts[0].flops_all for plan in watched.plans if plan.cuts)
    return {"axis": " and ".join(sorted({c.axis for c in on})), "share on it": round(sum(c.flops_on_rows for c in on) / max(1, total), 3)}


PARTS: dict[str, dict[str, Callable[[Model], Any]]] = {
    "decide": {"decide": decision},
    "numbers": {
        "default": default,
        "half fp32": lambda e: sampled(e, torch.float32),
        "half fp64": lambda e: sampled(e, torch.float64),
        "narrow": narrow,
    },
    "tokens": {"axis": axis, "tokens": on_tokens, "default": default},
    "inductor": {"inductor": lambda e: first_call(e, "inductor")},
    "approx": {"approx": lambda e: first_call(e, "approx")},
}
"""Each part runs in a process of its own. So the first calls are equal: in a process that has compiled the model before, one took a third longer."""


def run_part(entry: Model, part: str) -> dict[str, Any]:
    """All checks of a part; what raises is told as such, with the place."""
    torch.set_num_threads(1)
    decide.count_small_work()
    found: dict[str, Any] = {}
    for name, check in PARTS[part].items():
        start = time.perf_counter()
        try:
            found[name] = check(entry)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            found[name] = f"raises {type(e).__name__}: {str(e)[:600]} ({os.path.basename(last.filename)}:{last.lineno})"
        found[f"{name}, seconds"] = round(time.perf_counter() - start, 1)
    return found
