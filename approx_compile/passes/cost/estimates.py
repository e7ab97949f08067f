"""Site x machine -> time: what every product costs exactly and sampled, as expressions over the site's sizes, and whether the difference pays.

Sizes (sympy symbols, positive integers): B independent contractions (batch of a bmm, groups of a convolution); M, K, N, T as in
Y (M, N) = A (M, K) B (K, N) with T taps, for a convolution M places, K input and N output channels of a group; I and O entries per input and output
channel (M for a matmul); S rows that `grad_weight` contracts, M or a convolution's samples; e bytes of an entry; k kept of the contraction axis,
u units it is chosen from; p, q contiguous entries per kept index in the two operands and r in the result. |A| = B I K, |W| = B K N T, |Y| = B O N.

| term | FLOPs | bytes | launches | its time |
|---|---|---|---|---|
| product, exact | 2 B M K N T | | 1 | FLOPs / rate of that product at its sizes |
| product, sampled | the same with k for its axis | | 1 | the same at those sizes: a shorter axis has another rate |
| norms of both operands (none for `uniform`, the weight's alone for `topk_weights`) | 2 per entry | e per entry | 1 kernel | bytes / `norms` |
| selection | 10 B u log2 u | | 1 | `select.METHOD` at u, B |
| take, each operand | 1 per entry kept where scaled | 2 e per entry kept | 1 kernel | bytes / `take` at p or q |
| untake, a coupled gradient | 1 per entry kept where scaled | e per entry of the whole result | 1 kernel | bytes / `untake` at r |
| new memory, each tensor that these make but vectors | | e per entry | | bytes / `fresh`, of what is made besides results at `LIVE` times the size |
| a site that shares another's indices | | | | norms of its weight only, no selection, no take A; no untake if `grad_input`s are put back together |
| skip, each of dY and (for `grad_input`) W | | 2 e per entry left | 1 kernel | bytes / `take` at unit runs |
| skip, the result of `grad_weight` | | e per entry of the whole result | 1 kernel | bytes / `untake` |
| skip by a kernel, product; nothing else | n for N | | 1 | FLOPs / rate of that kernel |
| narrow (a producer makes only what its consumer keeps): W, for `output` | | 2 e per entry left | 1 kernel | bytes / `take` at q |
| narrow, the result of `grad_weight` | | e per entry of the whole result | 1 kernel | bytes / `untake` |
| narrow, product; dY comes narrow, W is there | n for N | | 1 | as above |
| fed (the consumer): no take of A, no untake of `grad_input` | | | | |

Under the lowerings `triton` and `cuda` there is no take and no untake (so sharing saves norms and selection only): a product steps over what was not
chosen, at the rates that the kernel itself has (`triton.linear.output`, coupled gradients `triton.linear.grad_input` and `.grad_weight`, which write the
zeros too; on its own axis a gradient runs the output's kernel). It steps over one axis: of a gradient with two either k or n is gathered, k anew where the
output's kernel did without. A profile without these tables gives a kernel the exact product's rate at the sizes kept.

`take` and `untake` are measured with half of the entries kept: 2 e per kept entry is then the size of the whole. Rates are tables of `machine`, read at
the sizes of the term (bandwidths at `LIVE` times the bytes); `kernel` is what a launch costs (a library call's is in the rates). FLOPs decide
nothing, they are reported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy

from approx_compile import _torch
from approx_compile.kernels.availability import CUSTOM_KERNELS
from approx_compile.kernels.estimators import Estimator
from approx_compile.kernels.gradient_replacements import Replacement
from approx_compile.machine import Machine
from approx_compile.passes.fx_utils import BMM, CONV
from approx_compile.passes.sites.conv_gradients import conv_groups
from approx_compile.passes.sites.site import Product, Site

MARGIN = 1.2
"""Predicted exact time over sampled time that sampling must reach (benchmarks/predict.py has how far expressions are off)."""

CONV_MARGIN = 1.5
"""The same for convolutions: in which layout their gathers run is Inductor's choice, and later."""

QUICK_MARGIN = 1.25
"""By this more where the machine was measured quickly."""

LEAST_LAUNCHES = 30
"""The time saved must be that of so many launches: what the expressions leave out, allocations, checks and dispatch, comes in launches. Sampling small
sites (up to 500 us) took longer than predicted by 9 launches in the median and by 31 at the 90th percentile (predict.csv, times of aa6a4e4)."""

MEASURED_MARGIN = 1.05
"""The same for times measured (each is a median, within a few percent of the next one)."""

LIVE = 4
"""Bandwidths are read at so many times the bytes: what was measured had the caches to itself. A step of one site goes through six tensors (its
operands, output and gradients) before it meets the first again, a gather and what it makes are one and a half."""

SHARE_MARGIN = 1.1
"""What sampling sites with indices of their own must take over sampling them with shared ones: of query, key and value sharing raises the gradient's error by a
tenth on average, of gate and up not at all (benchmarks/share_study.py); more entries kept would make a tenth good at about this price."""

SKIP_MARGIN = 1.05
"""The same for skipping zeros, which costs no accuracy."""

B, M, K, N, T, I, O, S, e, k, u, p, q, r, skip = SYMBOLS = sympy.symbols("B M K N T I O S e k u p q r n", positive=True)
_A, _W, _Y = B * I * K, B * K * N * T, B * O * N
_OPERANDS = {"output": (_A, _W, _Y, K), "grad_input": (_Y, _W, _A, N), "grad_weight": (_A, _Y, _W, S)}
"""Of each product: its operands' and its result's entries, and the axis it contracts."""


@dataclass(frozen=True)
class Term:
    """One line of the table above. `rate`: the machine's table, read `at` these sizes; its unit says which amount it divides or, in us, multiplies."""

    what: str
    rate: str
    at: tuple[sympy.Expr, ...] = ()
    flops: sympy.Expr = sympy.Integer(0)
    bytes: sympy.Expr = sympy.Integer(0)
    launches: sympy.Expr = sympy.Integer(0)

    def __str__(self) -> str:
        amount = self.launches if self.rate.startswith(("select", "kernel")) else self.flops if not self.bytes else self.bytes
        at = f" at {', '.join(map(str, self.at))}" if self.at else ""
        return f"{self.what}: {amount} by {self.rate}{at}"


class Case(NamedTuple):
    """What of a product decides which terms it has: of a "linear", "bmm" or "conv" site, exact | sampled | coupled, which zeros it skips; whether of N
    only n are made in the first place (`narrow`), and whether its activation comes so (`fed`); whether it `shares` what another site chose; which code runs it
    (`lowering`) and leaves out the zeros (`skips_by`); whether a coupled gradient gathers its operand itself (`alone`)."""

    kind: str
    product: str
    decision: str
    method: str = "topk"
    weight: int | None = None
    scaled: bool = False
    skips: bool = False
    shares: bool = False
    lowering: str = "inductor"
    narrow: bool = False
    fed: bool = False
    skips_by: str = "inductor"
    alone: bool = False


@functools.cache
def terms(case: Case) -> tuple[Term, ...]:
    """The terms of a product over `SYMBOLS`."""
    a, b, result, axis = _OPERANDS[case.product]
    if case.decision == "exact" and case.skips_by != "inductor":
        return (_product(case, {}),)
    if case.decision == "exact":
        made = result * skip / N if case.narrow and case.product == "output" else result
        return (*_skipping(case, {}), *_narrowed(case), _product(case, {}), _fresh("result", made))
    if case.decision == "coupled":
        small = {K: k}
        if case.lowering != "inductor":
            return (*_skipping(case, {}), _product(case, small), _kernels(1))
        product = (*_operand(case), *_skipping(case, small), _product(case, small), _extra("narrow result", k / K * result))
        if case.shares or (case.fed and case.product == "grad_input"):
            return product
        scale = k / K * result if case.scaled and case.product == "grad_weight" else sympy.Integer(0)
        untake = Term("untake", "untake", (r, e * result), scale, e * result, sympy.Integer(1))
        return (*product, untake, _fresh("result", result), _kernels(1))
    entries = {"uniform": 0 * a, "topk_weights": (a, b)[case.weight or 0]}.get(case.method, b if case.shares else a + b)
    norms = [Term("norms", "norms", (e * entries,), 2 * entries, e * entries, sympy.Integer(1))] if entries != 0 else []
    selection = Term("selection", f"select.{case.method}", (u, B), 10 * B * u * sympy.log(u, 2), launches=sympy.Integer(1))
    kept = k / axis
    if case.lowering != "inductor":
        chosen = [] if case.shares else [selection]
        return (*norms, *chosen, _product(case, _smaller(axis)), _kernels(len(norms)))
    takes = [
        Term(f"take {name}", "take", (run, 2 * e * kept * size), kept * size if case.scaled and name == "B" else 0 * e, 2 * e * kept * size)
        for name, size, run in (("A", a, p), ("B", b.subs(N, skip) if case.narrow else b, q))
        if name == "B" or not case.fed
    ]
    new = [_extra(t.what.removeprefix("take "), t.bytes / 2 / e) for t in takes]
    chosen = [takes[-1], new[-1]] if case.shares else [selection, *takes, *new]
    return (*norms, *chosen, _product(case, _smaller(axis)), _fresh("result", result), _kernels(len(norms) + 1))


def _smaller(axis: sympy.Symbol) -> dict[sympy.Symbol, sympy.Expr]:
    return {M: M * k / S, I: I * k / S, O: O * k / S} if axis is S else {axis: k}


def _product(case: Case, small: Mapping[sympy.Symbol, sympy.Expr]) -> Term:
    small = {N: skip, **small} if case.skips or case.narrow else small
    m, inner, n, taps = (x.subs(small, simultaneous=True) for x in (M, K, N, T))
    rate = "bmm" if case.kind == "bmm" else f"{case.kind}.{case.product}"
    turned = {"output": (m, inner, n), "grad_input": (m, n, inner), "grad_weight": (inner, m, n)}[case.product]
    at = {"linear": (m, inner, n), "conv": (m, inner, n, taps), "bmm": turned}[case.kind]
    if case.lowering != "inductor":
        own_axis = case.kind == "linear" and case.decision == "sampled"
        rate, at = (f"{case.lowering}.{case.kind}.output", turned) if own_axis else (f"{case.lowering}.{rate}", at)
    elif case.skips_by != "inductor":  # n is the axis that the kernel cuts: the contraction of dX, the columns of dW
        rate, at = f"{case.skips_by}.{case.kind}.{'output' if case.product == 'grad_input' else 'grad_weight'}", (m, n, inner)
    return Term("product", rate, at, 2 * B * m * inner * n * taps, launches=sympy.Integer(1))


def _skipping(case: Case, small: Mapping[sympy.Symbol, sympy.Expr]) -> list[Term]:
    """Gathering what is left of dY, and of the weight or into the weight's gradient, where other sites' zeros are skipped."""
    if not case.skips or case.skips_by != "inductor":
        return []
    left, weight = 2 * e * _Y * skip / N, (e * _W).subs(small)
    found = [Term("take dY", "take", (u, left), bytes=left, launches=sympy.Integer(1)), _extra("dY", left / 2 / e)]
    if case.product == "grad_input":
        found += [Term("take W", "take", (q, 2 * weight * skip / N), bytes=2 * weight * skip / N), _extra("W", weight * skip / N / e)]
    else:
        found += [Term("untake", "untake", (q, weight), bytes=weight), _extra("narrow result", weight * skip / N / e)]
    return [*found, _kernels(1)]


def _operand(case: Case) -> list[Term]:
    """Gathering the operand of a coupled gradient for it alone."""
    if not case.alone:
        return []
    name, size, run = ("W", _W, q) if case.product == "grad_input" else ("A", _A, p)
    return [Term(f"take {name}", "take", (run, 2 * e * k / K * size), bytes=2 * e * k / K * size), _extra(name, k / K * size), _kernels(1)]


def _fresh(what: str, entries: sympy.Expr, beside: int = 1) -> Term:
    return Term(f"new memory, {what}", "fresh", (beside * e * entries,), bytes=e * entries)


def _extra(what: str, entries: sympy.Expr) -> Term:
    """What sampling allocates besides the step's own tensors: it is what makes the allocator hand memory back, and map it anew, from smaller sizes on."""
    return _fresh(what, entries, LIVE)


def _narrowed(case: Case) -> list[Term]:
    """What an exact product takes besides when it makes, or reads a dY that has, n of N output channels."""
    if not case.narrow or case.product == "grad_input":
        return []
    if case.product == "output":
        return [Term("take W", "take", (q, 2 * e * _W * skip / N), bytes=2 * e * _W * skip / N), _extra("W", _W * skip / N), _kernels(1)]
    return [Term("untake", "untake", (q, e * _W), bytes=e * _W), _extra("narrow result", _W * skip / N), _kernels(1)]


def _kernels(count: int) -> Term:
    return Term("launches", "kernel", launches=sympy.Integer(count))


_AMOUNT = {"GFLOP/s": "flops", "GB/s": "bytes", "us": "launches"}


@functools.cache
def _numbers(case: Case) -> Any:
    """(flops, bytes, launches, sizes to read the rate at) of every term, as a function of the symbols."""
    return sympy.lambdify(SYMBOLS, [[t.flops, t.bytes, t.launches, list(t.at)] for t in terms(case)], "math")


Sizes = dict[sympy.Symbol, float]


@dataclass(frozen=True)
class Estimate:
    """FLOPs of a product, the sampling included, and its predicted time: in all, and by term, at which sizes. Without a machine there are no times."""

    flops: int
    time_us: float | None
    terms: tuple[tuple[str, float], ...] = ()
    sizes: tuple[tuple[str, float], ...] = ()


def evaluate(case: Case, sizes: Mapping[sympy.Symbol, float], dtype: Any, machine: Machine | None) -> Estimate:
    """The terms of a case at some sizes, on a machine."""
    flops, times = 0.0, []
    for term, (f, b, count, at) in zip(terms(case), _numbers(case)(*(sizes.get(s, 1) for s in SYMBOLS)), strict=True):
        flops += f
        if machine is None:
            continue
        table = _table(machine, term.rate, dtype)
        at = [x * LIVE if axis == "bytes" else x for x, axis in zip(at, table.axes, strict=True)]
        rate, unit = table.at(*at), table.unit
        amount = {"flops": f, "bytes": b, "launches": count}[_AMOUNT[unit]]
        times.append((str(term), amount * rate if unit == "us" else amount / rate / 1e3))
    used = sorted({str(s) for t in terms(case) for x in (t.flops, t.bytes, *t.at) for s in x.free_symbols})
    known = {str(s): float(v) for s, v in sizes.items()}
    return Estimate(round(flops), sum(t for _, t in times) if machine is not None else None, tuple(times), tuple((s, known[s]) for s in used))


def _table(machine: Machine, rate: str, dtype: Any) -> Any:
    """A profile's table; for a kernel that it was made without, that of the exact product."""
    lowering, _, exact = rate.partition(".")
    return machine.table(exact if lowering in CUSTOM_KERNELS and not machine.has(rate, dtype) else rate, dtype)


# --- sites ---


def sizes_of(site: Site) -> Sizes:
    """The sizes of a site, symbolic ones at the size they were traced with."""
    return {s: float(_torch.hint(v)) if not isinstance(v, float) else v for s, v in _sizes(site).items()}


def _sizes(site: Site) -> dict[sympy.Symbol, Any]:
    output = site.products[0]
    a, b, y = (_torch.value(n) for n in (*output.operands, site.node))
    found: dict[sympy.Symbol, Any] = {e: site.dtype.itemsize, B: _torch.hint(output.lead)}
    if site.node.target not in CONV:
        m, inner, n = a.shape[-2], a.shape[-1], b.shape[-1]
        return found | {M: m, K: inner, N: n, T: 1, I: m, O: m, S: m}
    groups, samples = conv_groups(site.node), _torch.hint(a.shape[0])
    places = [samples * _product_of(t.shape[2:]) for t in (a, y)]
    channels = [_torch.hint(t.shape[1]) // groups for t in (a, y)]
    return found | {
        M: places[0 if site.node.args[6] else 1],
        K: channels[0],
        N: channels[1],
        T: _product_of(b.shape[2:]),
        I: places[0],
        O: places[1],
        S: samples,
    }


def _product_of(sizes: Any) -> int:
    return int(sympy.prod([_torch.hint(s) for s in sizes]))


def kind_of(site: Site) -> str:
    return "conv" if site.node.target in CONV else "bmm" if site.node.target in BMM else "linear"


def role(product: Product) -> str:
    """Which of Y = A B, dA = dY B^T and dB = A^T dY a product is, under the names that these have where B is the weight."""
    if product.name == "output":
        return "output"
    grad_of = product.mask if product.mask >= 0 else 1 - product.reads
    return ("grad_input", "grad_weight")[grad_of]


def exact(site: Site, product: Product, machine: Machine | None) -> Estimate:
    return evaluate(Case(kind_of(site), role(product), "exact"), sizes_of(site), site.dtype, machine)


def sampled(
    site: Site, product: Product, how: Estimator, machine: Machine | None, kept: float | None = None, lowering: str = "inductor", shares: bool = False
) -> Estimate:
    """A product sampled along its own contraction axis; `kept` entries in place of the estimator's. `shares`: at the entries that another site chose."""
    runs = [_run(site, product, i) for i in (0, 1)]
    sizes = sizes_of(site) | {k: kept or how.kept, u: how.units, p: runs[0] * how.unit, q: runs[1] * how.unit}
    case = Case(kind_of(site), role(product), "sampled", how.method, how.weight, how.scaled, lowering=lowering, shares=shares)
    return evaluate(case, sizes, site.dtype, machine)


def coupled(
    site: Site, product: Product, how: Estimator, machine: Machine | None, kept: float | None = None, lowering: str = "inductor", shares: bool = False
) -> Estimate:
    """A gradient through the entries that the output kept (`how` is the output's). `shares`: another site's put it back, too."""
    run = _run(site, site.products[0], 0 if role(product) == "grad_input" else 1) * how.unit
    sizes = sizes_of(site) | {k: kept or how.kept, r: run}
    case = Case(kind_of(site), role(product), "coupled", how.method, how.weight, how.scaled, lowering=lowering, shares=shares)
    return evaluate(case, sizes, site.dtype, machine)


def skipped(
    site: Site, product: Product, how: Estimator | None, dropped: Estimator, machine: Machine | None,
    lowering: str = "inductor", skips_by: str = "inductor", shares: bool = False, alone: bool = False,
) -> Estimate:  # fmt: skip
    """A gradient, exact or coupled to its own output (`how`), that leaves out the output channels another site `dropped`. `shares` as in `coupled`.
    `alone`: its operand is gathered for it, the output's kernel did without."""
    sizes = sizes_of(site) | {skip: dropped.kept, u: dropped.unit, q: dropped.unit * _torch.hint(_torch.value(site.products[0].operands[0]).shape[-1])}
    if how is None:
        return evaluate(Case(kind_of(site), role(product), "exact", skips=True, skips_by=skips_by), sizes, site.dtype, machine)
    sizes |= {k: how.kept, r: how.unit}
    if alone:
        sizes |= {symbol: _run(site, site.products[0], i) * how.unit for i, symbol in enumerate((p, q))}
    case = Case(kind_of(site), role(product), "coupled", how.method, how.weight, how.scaled, True, shares, lowering, skips_by=skips_by, alone=alone)
    return evaluate(case, sizes, site.dtype, machine)


def shrunk(site: Site, product: Product, how: Estimator | None, only: Estimator | None, fed: bool, machine: Machine | None, shares: bool = False) -> Estimate:
    """A product, exact or sampled through the entries that the output kept (`how`), of a site that makes `only` what a consumer keeps, or is such a consumer
    (`fed`), or both. `shares` as in `sampled` and `coupled`."""
    if how is None:
        case, sizes = Case(kind_of(site), role(product), "exact"), sizes_of(site)
    else:
        output = product.name == "output"
        case = Case(kind_of(site), role(product), "sampled" if output else "coupled", how.method, how.weight, how.scaled, fed=fed, shares=shares)
        runs = [_run(site, site.products[0], i) * how.unit for i in (0, 1)]
        sizes = sizes_of(site) | {k: how.kept, u: how.units, p: runs[0], q: runs[1], r: runs[0 if role(product) == "grad_input" else 1]}
    if only is not None:
        width = _torch.hint(_torch.value(site.products[0].operands[0]).shape[-1]) if kind_of(site) != "conv" else 1
        case, sizes = case._replace(narrow=True), {q: only.unit * width} | sizes | {skip: only.kept}
    return evaluate(case, sizes, site.dtype, machine)


def _run(site: Site, product: Product, operand: int) -> int:
    """Contiguous entries per index of a product's axis in an operand. Inductor lays the activations of convolutions out channels last on CPUs."""
    value, axis = _torch.value(product.operands[operand]), product.axes[operand]
    if site.node.target in CONV and value.device.type == "cpu" and axis.dim != 0:
        return 1
    return max(1, _torch.hint(axis.view(value).stride(axis.dim))) if axis.split is None else 1


def pays(exact_us: float, sampled_us: float, margin: float) -> bool:
    """Whether the time saved beats the margin."""
    return exact_us > margin * sampled_us


def worth(kind: str, exact_us: float, sampled_us: float, machine: Machine) -> bool:
    """Whether the predicted times of a site ("conv" or another kind) call for sampling."""
    margin = (CONV_MARGIN if kind == "conv" else MARGIN) * (QUICK_MARGIN if machine.quick else 1)
    least = LEAST_LAUNCHES * machine.table("kernel").at()
    return pays(exact_us, sampled_us, margin) and exact_us - sampled_us > least


def replaced(site: Site, product: Product, how: Replacement) -> int:
    """FLOPs of what stands in a gradient's place: none for zeros, a draw an entry for random numbers; for max the magnitudes and sums of the output gradient,
    and 2 per entry kept and entry of the weight that it meets."""
    if how.method == "zero":
        return 0
    first, second = site.products[0].operands
    if how.method == "random":
        return _torch.numel(second if product.mask == 1 or product.reads == 0 else first)
    assert product.output_grad is not None
    dy = _torch.value(product.output_grad)
    if product.mask == 1:
        return 2 * _torch.numel(product.output_grad) + 2 * how.entries([_torch.hint(s) for s in dy.shape[2:]]) * _torch.hint(dy.shape[0]) * _torch.numel(second)
    return 2 * _torch.numel(product.output_grad) + how.j * site.flops // _torch.hint(dy.shape[product.output_grad_dim])
