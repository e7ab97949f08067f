"""The policy "measure": a child process times single sites, once, and stored times decide. Requests and stored data are tested, not the times."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compile import plans_of
from helpers.models import mlp
from torch import Tensor, nn

from approx_compile import machine
from approx_compile.backend import site_benchmark
from approx_compile.config import ApproxConfig
from approx_compile.machine import float32_precision, site_timings
from approx_compile.passes.joint_graph_pass import cache_key
from approx_compile.passes.sites.site import Context

MEASURE: dict[str, Any] = {"policy": "measure", "ratio": 0.5, "rules": [{"layers": "site"}]}


class Mixed(nn.Module):
    """A linear layer twice, a convolution and a product of two activations, each behind another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (nn.Linear(64, 64) for _ in range(4))
        self.conv = nn.Conv2d(32, 32, 3, padding=1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.two(torch.relu(self.one(torch.relu(self.stem(x))))))
        h = torch.relu(self.conv(h.view(-1, 32, 8, 8))).view(-1, 32, 16)
        h = h.transpose(1, 2) @ h.sin()
        return self.head(h.reshape(-1, 64))


@pytest.fixture
def times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return site_timings.path_of(machine.current())


def decisions(sites: list[Any]) -> dict[str, tuple[str, str]]:
    return {s.name: (s.decision, s.reason) for s in sites}


@pytest.mark.slow
def test_measured_once_then_remembered(times: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mlp(64, 64, 64, 64, 64), torch.randn(512, 64)
    sites = plans_of(model, MEASURE, x)
    stored = json.loads(times.read_text())
    ((question, us),) = stored["us"].items()  # the two in the middle are alike; raw data feeds the first, and the last layer is exact
    assert len(us) == 3 and min(us) > 0  # exact, single entries, runs
    assert ["measured" in s.reason for s in sites] == [False, True, True, False]
    monkeypatch.setattr(site_timings, "_run_benchmark", lambda questions, profile: pytest.fail("asked again"))
    assert decisions(plans_of(model, MEASURE, x)) == decisions(sites)

    for us, decision, says in (
        ([100, 60, 50], "sampled", "measured 2.00x at ratio 0.5"),
        ([100, 98, 99], "exact", "would not pay: measured 1.02x at ratio 0.5 (must exceed 1.05x)"),
    ):
        times.write_text(json.dumps(stored | {"us": {question: us}}))
        site = plans_of(model, MEASURE, x)[1]
        assert site.decision == decision and site.reason.endswith(says)
        if decision == "sampled":
            assert site.products[0].how.group == 16  # the second try


@pytest.mark.slow
def test_what_is_timed_is_what_is_planned(times: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of every request, given to the model of the single site, lead to the products that were to be timed."""
    asked: list[Any] = []

    def note(questions: Any, profile: Any) -> list[list[float]]:
        asked.extend(questions)
        return [[100.0, 50.0, 60.0] for _ in questions]

    monkeypatch.setattr(site_timings, "_run_benchmark", note)
    for options in ({}, {"sampling": "backward"}, {"sampling": "blackbox", "method": "crs"}, {"grad_weight": {"method": "bernoulli", "ratio": 0.25}}):
        asked.clear()
        times.unlink(missing_ok=True)
        wanted = {(s.kind, s.op): s.products for s in plans_of(Mixed(), MEASURE | options, torch.randn(512, 64))[1:-1]}
        assert len(asked) == (2 if options.get("sampling") == "backward" else 3)  # the gradients of the bmm have axes of 16
        for q in asked:
            torch._dynamo.reset()  # or sizes that differ from the last become symbols
            model = site_benchmark.SingleProduct(q.product)
            (site,) = plans_of(model, q.options[0], *model.given())
            op = {"mm": "addmm", "convolution": "conv2d", "bmm": "bmm"}[q.product.op]
            (products,) = [p for (kind, name), p in wanted.items() if name == op]
            assert [(p.name, p.decision, p.k, p.size, p.how) for p in site.products] == [(p.name, p.decision, p.k, p.size, p.how) for p in products]


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("huge", [True, False])
def test_sites_are_timed_on_the_pages_that_they_will_have(
    precisions: None, times: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], huge: bool
) -> None:
    """The child's backends, also that of the exact step, have the user's `huge_pages`, and times measured with the other setting are not used."""
    built: list[ApproxConfig] = []

    def child(questions: Any, profile: Any) -> list[list[float]]:
        told = {"threads": torch.get_num_threads(), "precision": float32_precision.settings(), "questions": [dataclasses.asdict(q) for q in questions]}
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(told)))
        site_benchmark.main()
        found: list[list[float]] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    def timed(product: Any, backends: Any) -> list[float]:
        built.extend(b.config for b in backends)
        return [100.0, *(50.0 for _ in backends[1:])]

    monkeypatch.setattr(site_timings, "_run_benchmark", child)
    monkeypatch.setattr(site_benchmark, "times_us", timed)
    x = torch.randn(512, 64)
    for _ in range(2):
        plans_of(Mixed(), MEASURE | {"huge_pages": huge}, x)
    assert built and {c.huge_pages for c in built} == {huge}
    before = len(built)
    plans_of(Mixed(), MEASURE | {"huge_pages": not huge}, x)
    assert len(built) == 2 * before


def test_another_file_is_another_key(times: Path) -> None:
    profile = machine.current()

    def key(options: dict[str, Any], profile: machine.Machine = profile) -> str:
        return cache_key(ApproxConfig(**options), Context(), (), profile)

    first = key(MEASURE)
    assert first == key(MEASURE) != key({"policy": "cost"})
    times.write_text("damaged")
    assert key(MEASURE) != first
    assert key({"policy": "cost"}) == key({"policy": "cost"}) != key({"policy": "cost"}, profile.model_copy(update={"quick": True}))


def older_one() -> None:
    torch.set_float32_matmul_precision("medium")


def convolutions_in_ieee() -> None:
    torch.backends.cudnn.allow_tf32 = False


def newer_ones_set_apart() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


NOTE = """
import atexit, sys
@atexit.register
def note():
    with open(__file__ + ".txt", "w") as f:
        f.write(repr(sys.modules["approx_compile.machine.float32_precision"].settings()))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("act", [older_one, convolutions_in_ieee, newer_ones_set_apart])
def test_the_child_multiplies_as_precisely(precisions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """The precision that the process that times sites has set when it ends."""
    (tmp_path / "sitecustomize.py").write_text(NOTE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    act()
    assert site_timings._run_benchmark([], machine.current()) == []
    assert (tmp_path / "sitecustomize.py.txt").read_text() == repr(float32_precision.settings())


def test_another_precision_is_another_file(precisions: None, times: Path) -> None:
    profile = machine.current()
    assert float32_precision.label("cpu") == float32_precision.label("cuda") == ""
    torch.set_float32_matmul_precision("highest")
    assert site_timings.path_of(profile) == times
    first = site_timings.store_id(profile)
    older_one()
    assert (float32_precision.label("cpu"), float32_precision.label("cuda")) == ("-matmul-bf16", "-matmul-tf32")
    assert site_timings.path_of(profile) != times and site_timings.store_id(profile) != first
    torch.set_float32_matmul_precision("highest")
    convolutions_in_ieee()
    assert (float32_precision.label("cpu"), float32_precision.label("cuda")) == ("", "-conv-ieee")


@pytest.mark.slow
def test_a_child_that_fails_says_so(times: Path) -> None:
    product = site_timings.TimedProduct("mm", (((4, 8), (8, 1)), ((9, 4), (4, 1))), "float32", "cpu")
    with pytest.raises(RuntimeError, match="policy 'measure': the process that times sites failed"):
        site_timings.step_times_us([site_timings.TimingRequest(product, ())], machine.current())
