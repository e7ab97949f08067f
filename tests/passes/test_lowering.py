"""Products that run in this project's kernels give the same numbers as Inductor's gathers.

On CPUs the kernels' ops run their readable reference implementations, so the whole pass runs here. The fixture `everywhere` offers the ops on this device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approx_compile import Backend, explain
from approx_compile.kernels import availability

pytestmark = pytest.mark.usefixtures("one_thread")


def images() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 1024, 3, padding=1), nn.ReLU(), nn.Conv2d(1024, 40, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(40, 4, 1), nn.Flatten(), nn.Linear(36, 4)
    )
    return model.to(memory_format=torch.channels_last), torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)


def trained(model: nn.Module, x: Tensor, options: dict[str, Any]) -> tuple[list[Tensor], Any, Any]:
    f, choices, plans = compiled(model, {"policy": "always", "min_k": 1} | options)
    torch.manual_seed(1)
    f(x).square().sum().backward()
    return grads(model, x), choices, plans


@pytest.mark.slow
@pytest.mark.sample(3)
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("sampling", ["forward", "backward", "blackbox"])
@pytest.mark.parametrize("method", ["topk", "topk_weights", "bernoulli", "wta"])
def test_linear_layers_get_the_numbers_of_gathers(method: str, sampling: str) -> None:
    if method == "topk_weights" and sampling == "backward":
        method = "crs"  # a weight gradient has no weight to rank by
    model, x = mlp(1024, 1024, 16), torch.randn(64, 1024, requires_grad=True)
    settings = {
        "method": method,
        "sampling": sampling,
        "group": 32,
        "rules": [{"layers": "linear", "grad_weight": {"group": 1}}] if sampling == "backward" else [],
    }
    want, chosen, _ = trained(model, x, settings | {"lowering": "inductor"})
    got, chosen_too, plans = trained(model, x, settings | {"lowering": "triton"})
    lowered = {(p.lowering, p.skips_by) for s in plans.sites for p in s.products if p.decision in ("sampled", "coupled") and p.size >= 64}
    assert lowered <= {("triton", "inductor"), ("inductor", "triton")}
    assert chosen.keys() == chosen_too.keys() and all(torch.equal(chosen[n], chosen_too[n]) for n in chosen if n.endswith("idx"))
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("sampling", ["forward", "blackbox"])
@pytest.mark.parametrize("method", ["topk", "bernoulli"])
def test_convolutions_get_the_numbers_of_gathers(method: str, sampling: str) -> None:
    model, x = images()
    settings = {"method": method, "sampling": sampling, "rules": [{"layers": ["conv[0]", "conv[2]", "linear"], "method": "exact"}]}
    want, _, _ = trained(model, x, settings | {"lowering": "inductor", "group": 32})
    got, _, plans = trained(model, x, settings | {"lowering": "triton", "group": 32})
    assert plans.sites[1].products[0].lowering == "triton"
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.usefixtures("everywhere")
def test_a_stride_that_is_one_number_for_both_dims() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 128, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.convolution(x, self.weight, None, [2], [1], [1], False, [0], 1)

    model, x = Conv(), torch.randn(2, 128, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = [trained(model, x, {"lowering": lowering, "group": 32}) for lowering in ("inductor", "triton")]
    assert [plans.sites[0].products[0].lowering for _, _, plans in found] == ["inductor", "triton"]
    assert max(relative(a, b) for a, b in zip(found[0][0], found[1][0], strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_convolutions_with_nothing_between_them() -> None:
    """The second reads an output that another node gives, because the first became a custom op."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 8, 1)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    want, _, _ = trained(model, x, {"lowering": "inductor", "group": 32})
    got, _, plans = trained(model, x, {"lowering": "triton", "group": 32, "rules": [{"layers": "2", "lowering": "inductor"}]})
    assert [s.products[0].lowering for s in plans.sites] == ["inductor", "triton", "inductor"]
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5


@pytest.mark.usefixtures("everywhere")
def test_one_op_takes_the_place_of_product_and_gathers() -> None:
    report = explain(
        mlp(256, 256, 8), torch.randn(32, 256), config={"policy": "always", "lowering": "triton", "rules": [{"layers": "linear[-1]", "method": "exact"}]}
    )
    site = report.sites[0]
    assert site.products["output"].lowering == "triton" and "by triton" in site.reason and "groups of 64" in site.reason
    after = "".join(report.after)
    assert "approx_compile.skip_matmul.default" in after and "approx_compile.skip_matmul_into.default" in after
    assert "_unsafe_index" not in after and "gather" not in after


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_inductor_compiles_the_ops_and_checkpoints_keep_the_choice() -> None:
    """The groups are drawn once, in spite of the recomputation: the output is the product of those at which the weight has a gradient."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    model, x = Twice(), torch.randn(32, 128, requires_grad=True)
    out = torch.compile(model, backend=Backend({"policy": "always", "method": "uniform", "ratio": 0.5, "group": 32, "lowering": "triton"}))(x)
    out.square().sum().backward()
    got = grads(model, x)
    kept = got[0].ne(0).all(0)  # the entries of the axis at which the weight has a gradient
    assert kept.view(4, 32).sum(1).sort().values.tolist() == [0, 0, 32, 32]
    want = F.linear(x * kept * 2, model.inner.weight, model.inner.bias)
    assert relative(out.detach(), want.detach()) < 1e-5
    want.square().sum().backward()
    assert max(relative(a, b) for a, b in zip(got, grads(model, x), strict=True)) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_patches_of_max_are_added_up_by_an_op_of_ours() -> None:
    """Plain 2-D convolutions have the same gradient as by Inductor's lowering. Other convolutions, and more entries than the kernel takes, are left to
    Inductor."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, groups=2)), torch.randn(4, 3, 9, 9)
    exact = {"policy": "always", "method": "exact"}
    rules = [{"layers": "conv", "grad_weight": {"method": "max", "j": 2}}]
    found = []
    for lowering in ("inductor", "auto"):
        torch._dynamo.reset()
        got, _, plans = trained(model, x, exact | {"rules": rules, "lowering": lowering})
        assert [s.products[-1].replacement.lowering for s in plans.sites] == [{"inductor": "inductor", "auto": "cuda"}[lowering]] * 2
        found.append(got)
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 1e-6
    torch._dynamo.reset()
    _, _, plans = trained(model, x, exact | {"rules": [{"layers": "conv", "grad_weight": {"method": "max", "j": 9}}]})
    assert [s.products[-1].replacement.lowering for s in plans.sites] == ["inductor"] * 2


@pytest.mark.slow
def test_max_says_why_it_is_not_run_by_the_lowering_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)), torch.randn(4, 3, 8, 8)

    def reasons(lowering: str, **replaced: Any) -> list[str]:
        torch._dynamo.reset()
        options = {"policy": "always", "method": "exact", "lowering": lowering, "rules": [{"layers": "site", "grad_weight": {"method": "max"} | replaced}]}
        return [s.reason for s in plans_of(model, options, x)]

    assert all(s.endswith(": max, 1 of 36 entries of the output gradient") for s in (reasons("auto")[0], reasons("inductor")[0]))
    assert reasons("cuda")[0].endswith("by inductor: cuda needs a CUDA device, the site is on cpu")
    assert "by inductor: triton has no kernel for max" in reasons("triton")[0]
    assert "by inductor: cuda has no kernel for max but that of convolutions" in reasons("cuda")[1]
    monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device: None)
    assert reasons("cuda")[0].endswith(", by cuda")
    assert reasons("cuda", j=9)[0].endswith("by inductor: the kernel for max keeps 1 to 8 entries")


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_what_a_kernel_of_ours_runs_is_not_narrowed_for_its_consumer() -> None:
    """A choice by the weight alone lets the layer before make fewer channels, except where a kernel reads whole operands."""
    model, x = mlp(256, 512, 512, 16), torch.randn(64, 256, requires_grad=True)
    options = {"method": "topk_weights", "group": 64}
    want, _, _ = trained(model, x, options | {"lowering": "inductor"})
    for rules in ([], [{"layers": "linear[1]", "lowering": "inductor"}], [{"layers": "linear[0]", "lowering": "inductor"}]):
        torch._dynamo.reset()
        got, _, plans = trained(model, x, options | {"lowering": "triton", "rules": rules})
        assert not any(s.shrinks for s in plans.sites if s.products[0].lowering == "triton")
        assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-5
