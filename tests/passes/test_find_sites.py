"""The sites that the pass finds in what users write: names, kinds, products, and the reason where one stays exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approx_compile import Backend

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}
BOTH = ["output", "grad_input", "grad_weight"]


class Call(nn.Module):
    """A module around a function of x and its own weight."""

    def __init__(self, f: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.f, self.weight = f, nn.Parameter(torch.randn(*shape) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.weight)


class Inner(nn.Module):
    """A wrapper, so that the inner module has a name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


X = (4, 8, 32)
SPELLINGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear_2d": (lambda: nn.Linear(32, 24), (8, 32), "addmm"),
    "linear_3d": (lambda: nn.Linear(32, 24), X, "addmm"),
    "linear_4d_no_bias": (lambda: nn.Linear(32, 24, bias=False), (2, 3, 4, 32), "mm"),
    "F.linear": (lambda: Call(F.linear, 24, 32), X, "mm"),
    "@": (lambda: Call(lambda x, w: x @ w, 32, 24), (8, 32), "mm"),
    "@_3d": (lambda: Call(lambda x, w: x @ w, 32, 24), X, "mm"),
    "matmul": (lambda: Call(torch.matmul, 32, 24), X, "mm"),
    "weight_first": (lambda: Call(lambda x, w: w @ x.t(), 24, 32), (8, 32), "mm"),
    "bmm": (lambda: Call(torch.bmm, 4, 32, 24), X, "bmm"),
    "baddbmm": (lambda: Call(lambda x, w: torch.baddbmm(torch.ones(24), x, w), 4, 32, 24), X, "baddbmm"),
    "einsum": (lambda: Call(lambda x, w: torch.einsum("bsd,ed->bse", x, w), 24, 32), X, "bmm"),
    "addmm": (lambda: Call(lambda x, w: torch.addmm(torch.ones(24), x, w, beta=0.5), 32, 24), (8, 32), "addmm"),
    "conv1d": (lambda: nn.Conv1d(32, 24, 3), (4, 32, 9), "conv1d"),
    "conv2d": (lambda: nn.Conv2d(32, 24, 3, padding="same"), (4, 32, 6, 6), "conv2d"),
    "conv2d_strided_dilated": (lambda: nn.Conv2d(32, 24, 3, stride=2, dilation=2), (4, 32, 9, 9), "conv2d"),
    "conv2d_grouped": (lambda: nn.Conv2d(64, 24, 3, groups=2), (4, 64, 6, 6), "conv2d"),
    "conv3d": (lambda: nn.Conv3d(32, 8, 3), (2, 32, 4, 4, 4), "conv3d"),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(32, 24, 3, stride=2, output_padding=1), (4, 32, 5, 5), "conv_transpose2d"),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 24)), (8, 32), "addmm"),
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_with_a_weight(name: str) -> None:
    make, shape, op = SPELLINGS[name]
    model = Inner(make())
    (site,) = plans_of(model, ALWAYS, torch.randn(shape, requires_grad=True))
    assert (site.op, site.name, site.decision) == (op, "inner", "sampled")
    assert site.kind == ("conv" if op.startswith("conv") else "linear")
    assert [p.name for p in site.products] in (BOTH, ["output", "grad_weight", "grad_input"])
    assert (site.products[0].k, site.products[0].size) == (16, 32)
    assert [p.decision for p in site.products] == ["sampled", "coupled", "coupled"]


@pytest.mark.parametrize(
    ("options", "decision"),
    [
        ({}, "coupled"),
        ({"sampling": "blackbox"}, "exact"),
        ({"sampling": "backward"}, "exact"),
        ({"grad_weight": "zero"}, "replaced"),
        ({"grad_weight": {"method": "max", "j": 4}}, "replaced"),
    ],
)
def test_one_row(options: dict[str, Any], decision: str) -> None:
    """The gradient of the weight is an outer product, which Inductor computes as an elementwise op (on CPUs the smallest ones). It is no product, but rules
    hold for it alike."""
    model, x = nn.Linear(12, 20, bias=False), torch.randn(1, 12, requires_grad=True)
    f, choices, plans = compiled(model, ALWAYS | {"min_k": 1} | options)
    y = f(x)
    y.square().sum().backward()
    dw, dx = grads(model, x)
    assert [(p.name, p.decision) for p in plans.sites[0].products if p.name == "grad_weight"] == [("grad_weight", decision)]
    w, dy = model.weight.detach(), 2 * y.detach()

    def kept(product: str, size: int) -> Tensor:
        return torch.zeros(size).index_fill(0, choices[f"mm.{product}.idx"], 1) if f"mm.{product}.idx" in choices else torch.ones(size)

    mask, coupled = kept("output", 12), options.get("sampling") != "blackbox"
    assert relative(y, (x * mask) @ w.t()) < 1e-6
    assert relative(dx, ((dy * kept("grad_input", 20)) @ w) * (mask if coupled else 1)) < 1e-6
    if decision != "replaced":
        assert relative(dw, dy.t() @ (x.detach() * (mask if coupled else 1))) < 1e-6
    else:
        j = options["grad_weight"]["j"] if "max" in str(options) else 0
        assert int(dw.any(1).sum()) == j and bool(dw[dy[0].abs().topk(j).indices].any(1).all())


def test_two_activations_have_two_input_gradients() -> None:
    sites = plans_of(lambda a, b: a @ b, ALWAYS, torch.randn(4, 8, 32, requires_grad=True), torch.randn(4, 32, 8, requires_grad=True))
    assert [p.name for p in sites[0].products] == ["output", "grad_input", "grad_input#2"]
    assert (sites[0].kind, sites[0].name, sites[0].decision) == ("matmul", "bmm", "sampled")


def test_one_tensor_twice_stays_exact() -> None:
    (site,) = plans_of(lambda a: a @ a.t(), ALWAYS, torch.randn(8, 32, requires_grad=True))
    assert site.decision == "exact" and "one tensor" in site.reason


@pytest.mark.slow
def test_multihead_attention_and_encoder_layer() -> None:
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False)
    sites = plans_of(layer, ALWAYS, torch.randn(4, 8, 64))
    names = [s.name for s in sites if s.kind == "linear"]
    for i in (0, 1):
        assert any(n.startswith(f"layers.{i}.self_attn") for n in names)
        assert {f"layers.{i}.linear1", f"layers.{i}.linear2"} <= set(names)
    assert all(s.decision == "sampled" for s in sites if s.kind == "linear")


def test_a_module_called_twice_and_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(torch.relu(self.a(x))))

    model = Tied()
    x = torch.randn(8, 32, requires_grad=True)
    options = ALWAYS | {"rules": [{"layers": "b", "method": "exact"}, {"layers": "a#2", "ratio": 0.75}]}
    sites = plans_of(model, options, x)
    assert [(s.name, s.decision, s.products[0].k) for s in sites] == [("a", "sampled", 16), ("a#2", "sampled", 24), ("b", "exact", 32)]
    exact_first = ALWAYS | {"rules": [{"layers": "a", "method": "exact"}]}
    assert [s.decision for s in plans_of(model, exact_first, x)] == ["exact", "exact", "sampled"]


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_equal_plain_ones(reentrant: bool) -> None:
    block = mlp(64, 64, 64)
    block.append(nn.Tanh())

    def run(checkpointed: bool, **options: Any) -> tuple[list[Tensor], list[Any]]:
        def forward(x: Tensor) -> Tensor:
            return checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)

        f, _, plans = compiled(forward, ALWAYS | options)
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        f(x).square().sum().backward()
        return grads(block, x), plans.sites

    for options in ({}, {"sampling": "backward"}):
        plain, sites = run(False, **options)
        again, sites_again = run(True, **options)
        assert [s.decision for s in sites] == [s.decision for s in sites_again] == ["sampled", "sampled"]
        assert max(relative(a, b) for a, b in zip(again, plain, strict=True)) < 1e-6


@pytest.mark.slow
def test_random_choices_are_not_made_again_under_checkpoint() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    for method in ("uniform", "bernoulli", "crs", "wta"):
        f, choices, _ = compiled(lambda x: checkpoint(lambda y: torch.tanh(y @ weight), x, use_reentrant=False), ALWAYS | {"method": method})
        x = torch.randn(16, 64, requires_grad=True)
        f(x).sum().backward()
        idx, scale = choices["mm.output.idx"], choices["mm.output.scale"]
        dropped = torch.ones(64, dtype=torch.bool)
        dropped[idx[scale > 0]] = False
        assert weight.grad is not None and x.grad is not None
        # the gradients vanish exactly where the forward pass dropped
        assert torch.equal(weight.grad.abs().sum(1) == 0, dropped) and torch.equal(x.grad.abs().sum(0) == 0, dropped)
        weight.grad = None


def test_no_choice_is_made_again_under_checkpoint() -> None:
    layer, ops = nn.Linear(64, 64), []

    def run(gm: torch.fx.GraphModule, *args: Any, is_backward: bool = False, **kwargs: Any) -> Any:
        ops.extend(str(n.target) for n in gm.graph.nodes if is_backward)
        return gm.forward

    f = torch.compile(
        lambda x: checkpoint(lambda y: torch.tanh(layer(y)), x, use_reentrant=False), backend=Backend(ALWAYS | {"method": "topk_weights"}, inner_compile=run)
    )
    f(torch.randn(16, 64)).sum().backward()
    assert "aten.tanh.default" in ops and not any("topk" in op or "sort" in op for op in ops)


@pytest.mark.parametrize("where", ["ambient", "inside"])
def test_autocast(where: str) -> None:
    layer = nn.Linear(64, 64)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(16, 64)
    if where == "inside":
        (site,) = plans_of(inside, ALWAYS, x)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (site,) = plans_of(layer, ALWAYS, x)
    assert (site.dtype, site.kind, site.decision) == ("bfloat16", "linear", "sampled")


def test_channels_last_keeps_its_layout() -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 32, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    f, _, plans = compiled(model, ALWAYS)
    y = f(x)
    y.sum().backward()
    assert plans[0].sampled == 2
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_dynamic_batch() -> None:
    model = mlp(64, 64, 64)
    f, _, plans = compiled(model, ALWAYS, dynamic=True)
    reference, _, static = compiled(model, ALWAYS, dynamic=False)
    for batch in (16, 24, 7):
        x = torch.randn(batch, 64)
        f(x).square().sum().backward()
        got = grads(model)
        reference(x).square().sum().backward()
        assert max(relative(a, b) for a, b in zip(got, grads(model), strict=True)) < 1e-6
    assert plans[0].sampled == 2 and (len(plans), len(static)) == (1, 3)


def test_dynamic_contraction_axis_is_exact_with_the_reason() -> None:
    model = nn.Linear(64, 64)
    f, _, plans = compiled(model, ALWAYS | {"sampling": "backward"}, dynamic=True)
    f(torch.randn(20, 64)).sum().backward()
    weight = plans.sites[0].products[-1]
    assert (weight.name, weight.decision, weight.reason) == ("grad_weight", "exact", "its contraction axis has a dynamic size")


def test_graph_breaks_give_several_graphs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            torch._dynamo.graph_break()
            return self.b(h)

    model = Broken()
    f, _, plans = compiled(model, ALWAYS)
    f(torch.randn(8, 64)).sum().backward()
    assert [[s.name for s in p.sites] for p in plans] == [["a"], ["b"]]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_frozen_weights_and_inputs_without_gradient() -> None:
    model = mlp(64, 64, 64, 64)
    model[2].weight.requires_grad_(False)
    sites = plans_of(model, ALWAYS, torch.randn(8, 64))
    assert [[p.name for p in s.products] for s in sites] == [["output", "grad_weight"], ["output", "grad_input"], BOTH]
    assert all(s.decision == "sampled" for s in sites)
    for p in model[0].parameters():
        p.requires_grad_(False)
    frozen = plans_of(model, ALWAYS, torch.randn(8, 64))[0]
    assert (frozen.decision, frozen.reason) == ("exact", "no gradient flows through it")


def test_no_grad_region_is_exact() -> None:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            h = a(x)
        return b(h)

    sites = plans_of(forward, ALWAYS, torch.randn(8, 64))
    assert [s.decision for s in sites] == ["exact", "sampled"]


def test_transforms_and_custom_functions_are_exact_with_the_reason() -> None:
    weight = nn.Parameter(torch.randn(64, 64))

    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return dy @ w.t(), x.t() @ dy

    def custom(x: Tensor) -> Tensor:
        return Straight.apply(x, weight) @ weight

    sites = plans_of(custom, ALWAYS, torch.randn(8, 64, requires_grad=True))
    assert [s.decision for s in sites] == ["exact", "sampled"]
    assert sites[0].reason == "inside a custom autograd.Function"

    def mapped(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: torch.tanh(row @ weight))(x).sum() + (x @ weight).sum()

    sites = plans_of(mapped, ALWAYS, torch.randn(8, 4, 64, requires_grad=True))
    assert [s.decision for s in sites] == ["exact", "sampled"]
    assert sites[0].reason == "inside a torch.func transform"


def test_a_mask_beside_an_activation_is_no_raw_data() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.a, self.b, self.c = nn.Embedding(50, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 50)

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return self.c(F.gelu(self.b(F.gelu(self.a(self.emb(tokens))) * mask)))

    sites = {s.name: s for s in plans_of(Masked(), {"ratio": 0.25}, torch.randint(50, (8, 512)), torch.rand(8, 512, 1))}
    assert [sites[n].decision for n in "abc"] == ["sampled", "sampled", "exact"]


def test_custom_functions_inside_checkpoint_give_their_own_reason() -> None:
    weight = nn.Parameter(torch.randn(64, 64))

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return 2 * (x @ w)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            x, w = ctx.saved_tensors
            return 2 * dy @ w.t(), 2 * x.t() @ dy

    def inside(x: Tensor) -> Tensor:
        return checkpoint(lambda y: torch.tanh(Double.apply(y, weight)), x, use_reentrant=False) @ weight

    sites = plans_of(inside, ALWAYS, torch.randn(8, 64, requires_grad=True))
    assert (sites[0].decision, sites[0].reason) == ("exact", "inside a custom autograd.Function")
    assert sites[-1].decision == "sampled"
