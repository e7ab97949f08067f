"""Which lowering runs a product: it is refused with a reason where its kernel does not fit, else it is chosen by time."""

from __future__ import annotations

import importlib.metadata
import itertools
from typing import Any

import pytest
import torch
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from helpers.oracles import grads, relative
from torch import Tensor, nn

from approx_compile import Backend, machine
from approx_compile.config.words import PRODUCTS
from approx_compile.kernels import availability, skip_matmul
from approx_compile.machine import benchmark_grids, microbenchmarks, site_timings, timer
from approx_compile.passes.joint_graph_pass import cache_key
from approx_compile.passes.sites.site import Context

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("everywhere")
def test_mixed_precision_runs_sixteen_wide_groups_in_cuda() -> None:
    model, x = mlp(128, 128, 8), torch.randn(32, 128)
    f, _, plans = compiled(model, {"policy": "always", "lowering": "cuda", "min_k": 1})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f(x).float().square().sum().backward()
    output = plans.sites[0].products[0]
    assert (output.lowering, output.how.group) == ("cuda", 16)
    plan = plans_of(mlp(128, 128, 8), {"policy": "always", "lowering": "cuda"}, x)
    assert plan[0].products[0].lowering == "inductor" and "cuda has no kernel for float32" in plan[0].reason


def test_every_device_is_asked_for_its_own_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: {0: (9, 0), 1: (7, 5)}[getattr(device, "index", None) or 0])
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    missing = availability.unavailable_reason.__wrapped__
    assert missing("triton", torch.device("cuda", 0)) is None and "has 7.5" in missing("triton", torch.device("cuda", 1))
    monkeypatch.setattr(torch.version, "hip", "6.4")  # where capabilities look alike
    assert "NVIDIA" in missing("triton", torch.device("cuda", 0)) and "NVIDIA" in missing("cuda", torch.device("cuda", 0))


@pytest.mark.slow
def test_without_a_gpu_the_reason_is_said_and_inductor_runs_it() -> None:
    x = torch.randn(32, 256)
    for lowering in ("triton", "cuda"):
        torch._dynamo.reset()
        site = plans_of(mlp(256, 256, 8), {"policy": "always", "lowering": lowering}, x)[0]
        assert site.products[0].lowering == "inductor" and f"by inductor: {lowering} needs a CUDA device, the site is on cpu" in site.reason
    torch._dynamo.reset()
    site = plans_of(mlp(256, 256, 8), {"policy": "always"}, x)[0]
    assert site.products[0].lowering == "inductor" and "by" not in site.reason


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (lambda: mlp(256, 256, 8), {"group": 24}, "skips whole groups of a multiple of 32, not 24"),
        (lambda: mlp(272, 256, 8), {"group": 32}, "with a tail"),
        (lambda: mlp(256, 256, 8).double(), {}, "no kernel for float64"),
    ],
)
def test_what_no_kernel_fits_is_refused_with_the_reason(make: Any, options: dict[str, Any], why: str) -> None:
    model = make()
    weight = next(model.parameters())
    site = plans_of(model, {"policy": "always", "lowering": "triton", "min_k": 1} | options, torch.randn(32, weight.shape[1], dtype=weight.dtype))[0]
    assert site.products[0].lowering == "inductor" and why in site.reason


@pytest.mark.usefixtures("everywhere")
def test_convolutions_that_no_kernel_fits() -> None:
    model = nn.Sequential(nn.Conv2d(256, 8, 3), nn.Conv2d(8, 256, 3, groups=8), nn.Conv2d(256, 8, 3, groups=2))
    sites = plans_of(model, {"policy": "always", "lowering": "triton", "min_k": 1, "group": 32}, torch.randn(2, 256, 9, 9))
    assert "not channels-last" in sites[0].reason and "without groups" in sites[2].reason
    torch._dynamo.reset()
    x = torch.randn(2, 256, 9, 9).contiguous(memory_format=torch.channels_last)
    for dilation, says in ((1, " by triton"), (2, "stride and dilation are both above 1, for which the gradient has no kernel")):
        (site,) = plans_of(nn.Conv2d(256, 8, 3, stride=2, dilation=dilation), {"policy": "always", "lowering": "triton", "group": 32}, x)
        assert site.reason.endswith(says)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("lowering", "group"), [("triton", 96), ("triton", 128), ("triton", 160), ("cuda", 48), ("cuda", 80)])
def test_groups_of_the_users_choice(lowering: str, group: int) -> None:
    model, x = mlp(960, 480, 8), torch.randn(32, 960)
    found = []
    for named in ("inductor", lowering):
        torch._dynamo.reset()
        f, _, plans = compiled(model, {"policy": "always", "lowering": named, "group": group, "rules": [{"layers": "linear[1:]", "method": "exact"}]})
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowering == "cuda"):
            f(x).float().square().sum().backward()
        assert (plans.sites[0].products[0].lowering, plans.sites[0].products[0].how.unit) == (
            named if 960 % group == 0 else "inductor",
            group if 960 % group == 0 else 1,
        )
        found.append(grads(model))
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < (1e-2 if lowering == "cuda" else 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_groups_of_convolutions_that_are_not_what_was_measured() -> None:
    """A lowering that is named takes groups of 16 channels; `auto`, which would use the rates of longer steps, leaves them to Inductor."""
    x = torch.randn(2, 256, 9, 9).contiguous(memory_format=torch.channels_last)
    profile = machine.current()
    tables = {f"triton.{n}": t.model_copy(update={"values": tuple(v * 20 for v in t.values)}) for n, t in profile.tables.items() if n.startswith("conv.")}
    found = {}
    with machine.use(profile.model_copy(update={"tables": profile.tables | tables})):
        for lowering, group in itertools.product(("triton", "auto"), (16, 24, 32, 128)):
            torch._dynamo.reset()
            (site,) = plans_of(nn.Conv2d(256, 8, 3), {"policy": "always", "lowering": lowering, "group": group}, x)
            found[lowering, group] = site.products[0].lowering
    assert [found["triton", g] for g in (16, 24, 32, 128)] == ["triton", "inductor", "triton", "triton"]
    assert [found["auto", g] for g in (16, 24, 32, 128)] == ["inductor", "inductor", "triton", "triton"]


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_a_bias_that_is_not_one_for_every_output() -> None:
    """A kernel would read beyond a bias that is broadcast, so it is refused; the op refuses it too."""

    class Added(nn.Module):
        def __init__(self, *bias: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(256, 32)), nn.Parameter(torch.randn(bias))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    for shape in ((1,), (), (1, 32)):
        torch._dynamo.reset()
        (site,) = plans_of(Added(*shape), {"policy": "always", "lowering": "triton"}, torch.randn(32, 256))
        assert site.products[0].lowering == "inductor" and "adds no plain bias" in site.reason
    torch._dynamo.reset()
    (site,) = plans_of(Added(32), {"policy": "always", "lowering": "triton"}, torch.randn(32, 256))
    assert site.products[0].lowering == "triton"
    for bias in (torch.randn(1), torch.randn(32).double()):
        with pytest.raises(ValueError, match=r"expected \(32,\) torch.float32, one for every column"):
            skip_matmul.skip_matmul(torch.randn(8, 64), torch.randn(64, 32), torch.arange(1), None, 32, bias)


@pytest.mark.slow
@pytest.mark.usefixtures("everywhere")
def test_time_decides_between_the_lowerings() -> None:
    """The profile says that a kernel is 20 times as fast as the products, or 20 times as slow: it is chosen, or it is not."""
    profile = machine.current()
    model, x = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)), torch.randn(1024, 8)
    for by, want in ((20.0, "triton"), (0.05, "inductor")):
        tables = {f"triton.{n}": t.model_copy(update={"values": tuple(v * by for v in t.values)}) for n, t in profile.tables.items() if n.startswith("linear.")}
        with machine.use(profile.model_copy(update={"tables": profile.tables | tables})):
            torch._dynamo.reset()
            site = plans_of(model, {"policy": "cost", "rules": [{"layers": "2", "ratio": 0.5}]}, x)[1]
        assert (site.decision, site.products[0].lowering) == ("sampled", want)
        assert any(term.startswith("product") and ("triton." in term) == (want == "triton") for term, _ in site.products[0].terms)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("policy", ["always", "cost"])
def test_auto_takes_no_kernel_that_was_not_measured(policy: str) -> None:
    """At the exact product's rate, which stands for an unknown one, a kernel without gathers would always be chosen."""
    model, x = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)), torch.randn(1024, 8)
    sites = plans_of(model, {"policy": policy, "ratio": 0.25}, x)
    assert sites[1].decision == "sampled" and {p.lowering for s in sites for p in s.products} == {"inductor"}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("fastest", ["inductor", "triton"])
def test_a_measured_time_is_that_of_the_lowering_it_decides_for(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each candidate is timed with its own lowering, and the one with the shortest time is the one that runs."""
    profile = machine.current()
    tables = {f"triton.{n}": t for n, t in profile.tables.items() if n.startswith("linear.")}
    asked: list[list[str]] = []

    def answers(questions: Any, profile: Any, say: Any) -> list[list[float]]:
        asked.extend([o["lowering"] for o in q.options] for q in questions)
        return [[100.0, *(50.0 if o["lowering"] == fastest else 60.0 for o in q.options)] for q in questions]

    monkeypatch.setattr(site_timings, "step_times_us", answers)
    model, x = nn.Sequential(nn.Linear(8, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)), torch.randn(1024, 8)
    with machine.use(profile.model_copy(update={"tables": profile.tables | tables})):
        site = plans_of(model, {"policy": "measure"}, x)[1]
    assert [set(a) for a in asked] == [{"inductor", "triton"}]
    assert (site.decision, site.products[0].lowering) == ("sampled", fastest)


@pytest.mark.usefixtures("everywhere")
def test_kernels_are_measured_where_they_run() -> None:
    grid = benchmark_grids.Grid(
        linear={"M": (1, 8), "K": (16, 64), "N": (1, 8)},
        bmm={"M": (4,), "K": (4,), "N": (4,)},
        conv={"places": (1, 256), "C": (64,), "O": (1, 8), "taps": (9,)},
        sizes=(2**14,),
        runs=(1,),
        allocated=(2**14,),
        select={"units": (16,), "lead": (1,)},
    )
    clock = timer.BenchmarkTimer("cpu", 1e-4)
    found = [step() for _, step in microbenchmarks.custom_kernel_steps("triton", "cpu", torch.float32, grid, clock)]
    found += [step() for _, step in microbenchmarks.custom_kernel_steps("cuda", "cpu", torch.bfloat16, grid, clock)]
    tables = {name: machine.Table(unit=unit, axes=axes, values=values) for name, unit, axes, values in found}
    kinds = [f"triton.{k}.{p}.float32" for k in ("linear", "conv") for p in PRODUCTS] + [f"cuda.linear.{p}.bfloat16" for p in PRODUCTS]
    assert sorted(tables) == sorted(kinds) and tables["triton.linear.output.float32"].axes["K"] == (64,)


def test_fp32_is_measured_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is named after a kernel but holds the reference's rates would be believed once TF32 is allowed."""
    clock = timer.BenchmarkTimer("cpu", 1e-4)
    for conv, matmul, steps in ((True, False, 3), (False, True, 3), (True, True, 6), (False, False, 0)):
        monkeypatch.setattr(availability, "allows_tf32", lambda conv, of={True: conv, False: matmul}: of[conv])
        assert len(list(microbenchmarks.custom_kernel_steps("triton", "cuda", torch.float32, benchmark_grids.GPU_GRID, clock))) == steps
        assert len(list(microbenchmarks.custom_kernel_steps("triton", "cuda", torch.bfloat16, benchmark_grids.GPU_GRID, clock))) == 6


def test_what_decisions_about_lowerings_read_is_in_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key has the installed packages, and whether their compiler exists."""
    config = Backend({"policy": "always"}).config
    keys = [cache_key(config, Context(), ())]
    monkeypatch.setattr(availability, "_installed", availability._installed.__wrapped__)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for why in (None, "no NVRTC"):
        monkeypatch.setattr(availability, "unavailable_reason", lambda lowering, device, why=why: why)
        keys.append(cache_key(config, Context(), ()))
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0")
    keys.append(cache_key(config, Context(), ()))
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.parametrize("backend", [torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_another_precision_is_another_cache_key(backend: Any) -> None:
    """Whether TF32 is allowed decides which of this project's kernels may run."""
    found, own = set(), backend.fp32_precision
    try:
        for backend.fp32_precision in ("ieee", "tf32"):
            found.add(cache_key(Backend({"policy": "always"}).config, Context(), ()))
    finally:
        backend.fp32_precision = own
    assert len(found) == 2
