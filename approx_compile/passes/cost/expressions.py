"""Symbolic cost of one matrix product or convolution: FLOPs, bytes and kernel launches, term by term, as sympy expressions over the sizes of its site.

A product is described by a `Case`; `terms` returns its cost terms. `cost.estimates` evaluates them at the sizes of a site with the rates of a machine.

Symbols (positive integers). B is the number of independent contractions (the batch of a bmm, the groups of a convolution). M, K, N and T are the sizes in
Y (M, N) = A (M, K) B (K, N) with T taps; for a convolution M counts output places and K and N the input and output channels of one group. I and O are the
entries per input and output channel (M for a matmul). S is the number of rows that `grad_weight` contracts: M, or the samples of a convolution. e is the bytes
per entry, k the entries kept of the contraction axis, u the units they are chosen from, n the output channels left after skipping or narrowing. p, q and r are
the contiguous entries per kept index in the two operands and in the result. |A| = B I K, |W| = B K N T, |Y| = B O N.

| term | FLOPs | bytes | launches | its time |
|---|---|---|---|---|
| product, exact | 2 B M K N T | | 1 | FLOPs / rate of that product at its sizes |
| product, sampled | the same with k for its axis | | 1 | the same at those sizes: a shorter axis has another rate |
| norms of both operands (none for `uniform`, the weight's alone for `topk_weights`) | 2 per entry | e per entry | 1 kernel | bytes / `norms` |
| selection | 10 B u log2 u | | 1 | `select.METHOD` at u, B |
| take, each operand | 1 per entry kept where scaled | 2 e per entry kept | 1 kernel | bytes / `take` at p or q |
| untake, a coupled gradient | 1 per entry kept where scaled | e per entry of the whole result | 1 kernel | bytes / `untake` at r |
| new memory, each tensor made, except vectors | | e per entry | | bytes / `fresh`, read at the size of a result, at `WORKING_SET_FACTOR` times that of others |
| a site that shares another's indices | | | | norms of its weight only, no selection, no take A; no untake if `grad_input`s are put back together |
| skip, each of dY and (for `grad_input`) W | | 2 e per entry left | 1 kernel | bytes / `take` at unit runs |
| skip, the result of `grad_weight` | | e per entry of the whole result | 1 kernel | bytes / `untake` |
| skip by a kernel, product; nothing else | n for N | | 1 | FLOPs / rate of that kernel |
| narrow (a producer makes only what its consumer keeps): W, for `output` | | 2 e per entry left | 1 kernel | bytes / `take` at q |
| narrow, the result of `grad_weight` | | e per entry of the whole result | 1 kernel | bytes / `untake` |
| narrow, product; dY comes narrow, W is there | n for N | | 1 | as above |
| chooses (a producer with `adaptive_dropout`): the mean row of A, times W | 1 per entry of A, 2 of W | e per entry of both | 2 kernels | bytes / `norms` |
| chooses (a producer with `alsh`): projections of A and sometimes of W | 2 per bit and entry | | `HASH_KERNELS` | FLOPs / `linear.output` |
| fed (the consumer): no take of A, no untake of `grad_input` | | | | |

With the lowerings `triton` and `cuda` there is no take and no untake, so sharing indices saves norms and selection only: the kernel reads whole operands and
steps over the entries that were not chosen. Such a product uses the measured rates of its kernel: `triton.linear.output`; for coupled gradients
`triton.linear.grad_input` and `.grad_weight`, which also write the zeros. A gradient sampled on its own axis runs the kernel of the output. A kernel steps over
one axis. Of a gradient that is sparse along two axes (k and n) the other one is gathered; k is gathered anew where the kernel of the output did not gather it.
A profile without rates for these kernels gives them the rate of the exact product at the sizes kept.

`take` and `untake` are measured with half of the entries kept, so there 2 e per kept entry is the size of the whole tensor. Rates are tables of
the machine's profile, read at the sizes of the term (bandwidths at `WORKING_SET_FACTOR` times the bytes). `kernel` is the time of one launch; for library calls
the launch is contained in the rate. FLOPs decide nothing, they are only reported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import sympy

WORKING_SET_FACTOR = 4
"""Bandwidths are read at this many times the bytes moved, because the benchmark that measured them had the caches to itself. In a training step one site uses
six tensors (operands, output and gradients) before it touches the first again; a gather and its result are one and a half times the bytes."""

HASH_BITS = 30
"""Bits that `alsh` computes for an input or a unit: 5 tables of 6 bits, the default. Other settings change the time of a step by little."""

REBUILT = 1000
"""Samples after which `alsh` rebuilds its tables, which takes a projection of every unit: the default."""

HASH_KERNELS = 40
"""Kernels that one look-up of `alsh` launches."""

B, M, K, N, T, I, O, S, e, k, u, p, q, r, skip = SYMBOLS = sympy.symbols("B M K N T I O S e k u p q r n", positive=True)
"""The symbols, in the order in which the evaluated expressions take them. `skip` is the symbol n."""

_A, _W, _Y = B * I * K, B * K * N * T, B * O * N
_OPERANDS = {"output": (_A, _W, _Y, K), "grad_input": (_Y, _W, _A, N), "grad_weight": (_A, _Y, _W, S)}
"""Of each product: the entries of its two operands and of its result, and the axis that it contracts."""


@dataclass(frozen=True)
class Term:
    """One line of the table above: an amount of work and the rate at which a machine does it.

    `rate` names a table of the machine's profile, which is read at the sizes `at`. The unit of the table says which amount counts: FLOPs or bytes, which are
    divided by the rate, or launches, which are multiplied by it (us).
    """

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
    """What decides which terms a product has.

    Attributes:
        kind: Kind of the site: "linear", "bmm" or "conv".
        product: Role of the product: "output", "grad_input" or "grad_weight".
        decision: "exact", "sampled" along its own axis, or "coupled" to the entries that the output kept.
        method: Method of the estimator.
        weight: Which operand is a weight (0 or 1), if one is.
        scaled: Whether kept entries are scaled.
        skips: Whether output channels that another site dropped are left out.
        shares: Whether the product uses indices that another site selected.
        lowering: The code that runs the product.
        narrow: Whether only n of the N output channels are made in the first place.
        fed: Whether the activation arrives with the kept channels only.
        skips_by: The code that leaves out dropped channels.
        alone: Whether a coupled gradient gathers its operand for itself.
        chooses: The method by which the site chooses the units that it makes; empty if it does not.
    """

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
    chooses: str = ""


@functools.cache
def terms(case: Case) -> tuple[Term, ...]:
    """Return the cost terms of a product, as expressions over `SYMBOLS`."""
    if case.decision == "exact":
        return _exact_terms(case)
    return _coupled_terms(case) if case.decision == "coupled" else _sampled_terms(case)


def _exact_terms(case: Case) -> tuple[Term, ...]:
    if case.skips_by != "inductor":
        return (_product(case, {}),)
    *_, result, _ = _OPERANDS[case.product]
    made = result * skip / N if case.narrow and case.product == "output" else result
    return (*_choosing(case), *_skipping(case, {}), *_narrowing(case), _product(case, {}), _new_memory("result", made))


def _coupled_terms(case: Case) -> tuple[Term, ...]:
    *_, result, _ = _OPERANDS[case.product]
    small = {K: k}
    if case.lowering != "inductor":
        return (*_skipping(case, {}), _product(case, small), _launches(1))
    product = (*_operand_gather(case), *_skipping(case, small), _product(case, small), _extra_memory("narrow result", k / K * result))
    if case.shares or (case.fed and case.product == "grad_input"):
        return product
    scale = k / K * result if case.scaled and case.product == "grad_weight" else sympy.Integer(0)
    untake = Term("untake", "untake", (r, e * result), scale, e * result, sympy.Integer(1))
    return (*product, untake, _new_memory("result", result), _launches(1))


def _sampled_terms(case: Case) -> tuple[Term, ...]:
    a, b, result, axis = _OPERANDS[case.product]
    entries = {"uniform": 0 * a, "topk_weights": (a, b)[case.weight or 0]}.get(case.method, b if case.shares else a + b)
    norms = [Term("norms", "norms", (e * entries,), 2 * entries, e * entries, sympy.Integer(1))] if entries != 0 else []
    selection = Term("selection", f"select.{case.method}", (u, B), 10 * B * u * sympy.log(u, 2), launches=sympy.Integer(1))
    small = {M: M * k / S, I: I * k / S, O: O * k / S} if axis is S else {axis: k}
    if case.lowering != "inductor":
        chosen = [] if case.shares else [selection]
        return (*norms, *chosen, _product(case, small), _launches(len(norms)))
    kept = k / axis
    takes = [
        Term(f"take {name}", "take", (run, 2 * e * kept * size), kept * size if case.scaled and name == "B" else 0 * e, 2 * e * kept * size)
        for name, size, run in (("A", a, p), ("B", b.subs(N, skip) if case.narrow else b, q))
        if name == "B" or not case.fed
    ]
    gathered = [_extra_memory(t.what.removeprefix("take "), t.bytes / 2 / e) for t in takes]
    chosen = [takes[-1], gathered[-1]] if case.shares else [selection, *takes, *gathered]
    return (*_choosing(case), *norms, *chosen, _product(case, small), _new_memory("result", result), _launches(len(norms) + 1))


def _product(case: Case, small: Mapping[sympy.Symbol, sympy.Expr]) -> Term:
    """The product itself. `small` holds the reduced sizes of the axes that are sampled."""
    small = {N: skip, **small} if case.skips or case.narrow else small
    m, inner, n, taps = (x.subs(small, simultaneous=True) for x in (M, K, N, T))
    rate = "bmm" if case.kind == "bmm" else f"{case.kind}.{case.product}"
    as_matmul = {"output": (m, inner, n), "grad_input": (m, n, inner), "grad_weight": (inner, m, n)}[case.product]
    at = {"linear": (m, inner, n), "conv": (m, inner, n, taps), "bmm": as_matmul}[case.kind]
    if case.lowering != "inductor":
        on_own_axis = case.kind == "linear" and case.decision == "sampled"
        rate, at = (f"{case.lowering}.{case.kind}.output", as_matmul) if on_own_axis else (f"{case.lowering}.{rate}", at)
    elif case.skips_by != "inductor":  # n is the axis along which the kernel skips: the contraction of dX, the columns of dW
        rate, at = f"{case.skips_by}.{case.kind}.{'output' if case.product == 'grad_input' else 'grad_weight'}", (m, n, inner)
    return Term("product", rate, at, 2 * B * m * inner * n * taps, launches=sympy.Integer(1))


def _skipping(case: Case, small: Mapping[sympy.Symbol, sympy.Expr]) -> list[Term]:
    """Gathers that leave out channels dropped by another site: of dY, and of the weight or of the weight's gradient."""
    if not case.skips or case.skips_by != "inductor":
        return []
    left, weight = 2 * e * _Y * skip / N, (e * _W).subs(small)
    gathers = [Term("take dY", "take", (u, left), bytes=left, launches=sympy.Integer(1)), _extra_memory("dY", left / 2 / e)]
    if case.product == "grad_input":
        gathers += [Term("take W", "take", (q, 2 * weight * skip / N), bytes=2 * weight * skip / N), _extra_memory("W", weight * skip / N / e)]
    else:
        gathers += [Term("untake", "untake", (q, weight), bytes=weight), _extra_memory("narrow result", weight * skip / N / e)]
    return [*gathers, _launches(1)]


def _operand_gather(case: Case) -> list[Term]:
    """The gather of an operand that only this coupled gradient uses."""
    if not case.alone:
        return []
    name, size, run = ("W", _W, q) if case.product == "grad_input" else ("A", _A, p)
    return [Term(f"take {name}", "take", (run, 2 * e * k / K * size), bytes=2 * e * k / K * size), _extra_memory(name, k / K * size), _launches(1)]


def _narrowing(case: Case) -> list[Term]:
    """What an exact product takes in addition when it makes n of N output channels, or reads a dY that has only these."""
    if not case.narrow or case.product == "grad_input":
        return []
    if case.product == "output":
        return [Term("take W", "take", (q, 2 * e * _W * skip / N), bytes=2 * e * _W * skip / N), _extra_memory("W", _W * skip / N), _launches(1)]
    return [Term("untake", "untake", (q, e * _W), bytes=e * _W), _extra_memory("narrow result", _W * skip / N), _launches(1)]


def _choosing(case: Case) -> list[Term]:
    """The estimate by which a site chooses the units that it makes."""
    if case.chooses == "alsh":
        hashing = 2 * HASH_BITS * (_A + _W * M / REBUILT)
        return [Term("hashing", "linear.output", (M, K, sympy.Integer(HASH_BITS)), hashing), _launches(HASH_KERNELS)]
    if case.chooses != "adaptive_dropout":
        return []
    entries = _A + _W
    return [Term("estimate of units", "norms", (e * entries,), 2 * _W + _A, e * entries), _launches(2)]


def _new_memory(what: str, entries: sympy.Expr, read_at: int = 1) -> Term:
    return Term(f"new memory, {what}", "fresh", (read_at * e * entries,), bytes=e * entries)


def _extra_memory(what: str, entries: sympy.Expr) -> Term:
    """Memory that only sampling allocates. Because of it the allocator returns memory to the system, and maps it again, from smaller sizes on."""
    return _new_memory(what, entries, WORKING_SET_FACTOR)


def _launches(count: int) -> Term:
    return Term("launches", "kernel", launches=sympy.Integer(count))
