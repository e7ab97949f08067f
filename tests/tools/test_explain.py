"""`explain`: what it reports, and that it changes nothing in the model."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from typing import Any

import networkx as nx
import pytest
import torch
from helpers.compile import compiled
from helpers.models import mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from approx_compile import ApproxWarning, Backend, ConfigError, decisions, explain, load_state_dict, set_phase, set_step, state_dict
from approx_compile.backend import run_as_is
from approx_compile.tools.report.report_text import lines
from approx_compile.tools.report.words import si, type_of

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop, self.fc = nn.Conv2d(16, 64, 3), nn.BatchNorm2d(64), nn.Dropout(0.5), nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def test_table_totals_and_reasons() -> None:
    report = explain(ConvNet(), torch.randn(64, 16, 6, 6), config=ALWAYS)
    conv, fc = report.sites
    assert (conv.name, conv.op, conv.shape, conv.dtype) == ("conv", "conv2d", "64x16x6x6 * 64x16x3x3", "float32")
    assert (conv.decision, conv.reason) == ("exact", "axis of 16, min_k is 16; its gradients skip what later sites dropped")
    assert (fc.decision, fc.method, fc.ratio, fc.k, fc.size) == ("sampled", "topk", 0.5, 32, 64)
    flops = 2 * 64 * 16 * (64 * 16 * 9)
    assert conv.flops_exact == 2 * flops  # the input needs no gradient: two products
    assert fc.flops_exact == 3 * (2 * 64 * 64 * 10)
    norms, selection = 2 * (64 * 64 + 64 * 10), 10 * 64 * 6
    assert fc.products["output"].flops_sampled == fc.flops_exact // 3 // 2 + norms + selection
    assert report.flops_exact == conv.flops_exact + fc.flops_exact
    text = str(report)
    for piece in ("Conv2d 16 -> 64, 3x3", "Linear 64 -> 10", "axis of 16, min_k is 16", "keeps 32 of 64 (topk)", "FLOPs: matrix products of one training step"):
        assert piece in text
    assert text.startswith(f"Forward: SAMPLED in 1 of 2 layers (topk). Backward: only what forward keeps in 1 of 2 layers. FLOPs {si(report.flops_exact)} -> ")


def test_adaptive_rows_start_whole_and_say_the_least(small_work_counts: None) -> None:
    model, x = mlp(64, 64, 64, 64, 8), torch.randn(64, 64)
    report = explain(model, x)
    text = str(report)
    assert text.startswith(f"Forward: exact. Backward: adaptive rows, 64 of 64 now (could drop to 4). FLOPs {si(report.flops_exact)} now; about ")
    assert "if a quarter of the rows is kept" in text.replace("\n", " ") and "64 of 64 rows now" in text and "addmm" not in text
    forward = sum(s.products["output"].flops_exact for s in report.sites)
    assert (report.flops_now, report.flops_possible) == (report.flops_exact, forward + (report.flops_exact - forward) // 4)
    assert report.to_dict()["adaptive"] == {"rows": {}, "least_rows": 0.0625, "min_rows": 2, "outputs": None, "least_outputs": 0.25, "steps": 0, "history": {}}
    assert re.search(r"addmm s\d+x64x64 float32, 64 of 64", str(explain(model, x, verbose=True)))


def test_after_training_it_says_what_is_kept_now(small_work_counts: None) -> None:
    model, x = mlp(64, 64, 64, 8), torch.randn(64, 64)
    f = torch.compile(model, backend=Backend(None, inner_compile=run_as_is))
    f(x).square().mean().backward()
    (control,) = decisions(model).cuts.values()
    control.changes.append((1, 0.5))
    report = explain(f, x)
    assert report.adaptive is not None and (report.adaptive.rows, report.adaptive.steps) == ({1: 0.5}, 1)
    assert report.adaptive.history == {"whole backward pass": ((0, 1.0), (1, 0.5))}
    assert "adaptive rows, 32 of 64 now" in str(report) and report.flops_possible < report.flops_now < report.flops_exact
    control.changes.append((2, 0.125))  # less than the quarter that "possible" assumes
    report = explain(f, x)
    assert f"FLOPs {si(report.flops_exact)} -> {si(report.flops_now)} (" in str(report) and report.flops_possible == report.flops_now


def test_adaptive_outputs_start_exact() -> None:
    report = explain(mlp(64, 64, 64), torch.randn(32, 64), config={"policy": "adaptive", "output": "topk", "grad": "exact"})
    assert report.sites[0].k == 16  # the plan is that of the lowest rung, the text says what holds
    text = str(report)
    assert text.startswith("Forward: exact now, 2 of 2 layers may be SAMPLED later (topk, down to 25 %).")
    assert "exact now, later 16 of 64 (topk)" in text and report.flops_now == report.flops_exact > report.flops_possible


def test_equal_layers_share_a_line() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks = nn.Linear(32, 64), nn.ModuleList(mlp(64, 64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return x

    report = explain(Blocks(), torch.randn(8, 32), config={"method": "exact"})
    assert [line.label for line in lines(report)] == ["stem", "blocks.*.* x 6"]
    assert len(lines(report, collapse=False)) == 7
    assert [line.label for line in lines(explain(mlp(64, 64, 64, 64), torch.randn(8, 64), config={"method": "exact"}))] == ["0", "2, 4"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_text_is_as_wide_as_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = nn.Sequential(OrderedDict([("a_long_name_of_a_layer", nn.Linear(64, 64)), ("norm", nn.BatchNorm1d(64)), ("head", nn.Linear(64, 10))]))
    text = str(explain(model, torch.randn(32, 64)))
    assert max(map(len, text.splitlines())) <= width and "a_long_name_of_a_layer" in text


def test_types_of_layers() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 32, 3, groups=4), nn.ConvTranspose1d(32, 8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x).flatten(2))
            return h @ h.transpose(1, 2)

    report = explain(Kinds(), torch.randn(4, 16, 6, 6))
    assert [type_of(s) for s in report.sites] == ["Conv2d 16 -> 32, 3x3, 4 groups", "ConvTranspose1d 32 -> 8, 5", "matmul 8x20 @ 20x8"]


def test_bytes_of_operands_and_results() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Unflatten(1, (16, 2, 2)), nn.Conv2d(16, 8, 2))
    linear, conv = explain(model, torch.randn(5, 32), config=ALWAYS).sites
    assert {p.bytes_exact for p in linear.products.values()} == {4 * (5 * 32 + 32 * 64 + 5 * 64)}
    x, w, y = 5 * 16 * 2 * 2, 8 * 16 * 2 * 2, 5 * 8
    assert {n: p.bytes_exact for n, p in conv.products.items()} == dict.fromkeys(("output", "grad_input", "grad_weight"), 4 * (x + w + y))
    with torch.autocast("cpu", torch.bfloat16):
        (half,) = explain(nn.Linear(32, 64), torch.randn(5, 32), config=ALWAYS).sites
    assert half.products["output"].bytes_exact == 2 * (5 * 32 + 32 * 64 + 5 * 64)
    (bmm,) = explain(torch.bmm, torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 64, 5, requires_grad=True), config=ALWAYS).sites
    assert {p.bytes_exact for p in bmm.products.values()} == {4 * 2 * (3 * 64 + 64 * 5 + 3 * 5)} and len(bmm.products) == 3


def test_as_plain_values() -> None:
    report = explain(mlp(64, 64, 64), torch.randn(8, 64), config=ALWAYS)
    content = json.loads(json.dumps(report.to_dict()))
    assert [s["name"] for s in content["sites"]] == ["0", "2"] and content["sites"][0]["products"]["output"]["k"] == 32
    assert (content["flops_exact"], content["flops_sampled"], content["graphs"]) == (report.flops_exact, report.flops_sampled, 1)


def test_names_with_brackets_are_printed_as_they_are() -> None:
    model = nn.Sequential(OrderedDict([("[red]x[/b]", nn.Linear(64, 64))]))
    assert "[red]x[/b]" in str(explain(model, torch.randn(8, 64), config=ALWAYS))


def test_graphs_before_and_after() -> None:
    report = explain(mlp(64, 64, 64), torch.randn(8, 64), config=ALWAYS)
    (before,), (after,) = report.before, report.after
    assert before.count("aten.mm.") == after.count("aten.mm.") == 3
    assert "topk" not in before and after.count("aten.topk.") == 2 and "f32[8, 32]" in after


def test_graph_of_sites() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.d(self.b(h) * self.c(h))

    graph = explain(Branch(), torch.randn(8, 64), config=ALWAYS).to_networkx()
    assert isinstance(graph, nx.DiGraph)
    assert set(graph.edges) == {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}
    assert graph.nodes["b"]["decision"] == "sampled" and graph.nodes["b"]["k"] == 32


@pytest.mark.slow
def test_it_changes_nothing() -> None:
    model = ConvNet()
    x = torch.randn(8, 16, 6, 6)
    model(x).sum().backward()
    hooks: list[int] = []
    model.fc.register_forward_hook(lambda *a: hooks.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    keys, parameters = set(model.__dict__), list(model.parameters())
    gradients = [p.grad.clone() for p in parameters]
    rng, calls, count = torch.get_rng_state(), model.calls, len(hooks)
    explain(model, x, config=ALWAYS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    assert (model.calls, set(model.__dict__), model.training) == (calls, keys, True)
    assert len(model.fc._forward_hooks) == 1 and len(hooks) >= count
    assert not x.requires_grad


@pytest.mark.slow
def test_it_spends_no_recompiles_of_the_user() -> None:
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3))
    f, _, plans = compiled(model, ALWAYS)
    x = torch.randn(8, 16, 6, 6)
    f(x)
    for batch in range(2, 14):  # more calls than Dynamo's limit of variants, with as many sizes
        report = explain(model, torch.randn(batch, 16, 6, 6), config=ALWAYS)
        assert report.sites[0].shape.startswith(f"{batch}x16")  # static: nothing was learnt from the other sizes
    f(x)
    assert len(plans) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        f(x)


@pytest.mark.slow
def test_config_of_a_compiled_model() -> None:
    x = torch.randn(8, 64)
    by_name = torch.compile(mlp(64, 64, 64), backend="approx", options=ALWAYS | {"ratio": 0.25})
    assert [s.k for s in explain(by_name, x).sites] == [16, 16]
    by_object, _, _ = compiled(mlp(64, 64, 64), ALWAYS | {"ratio": 0.75})
    assert [s.k for s in explain(by_object, x).sites] == [48, 48]
    assert [s.k for s in explain(by_object, x, config=ALWAYS).sites] == [32, 32]


class Held(nn.Module):
    """A module with a forward that the user has set, in which torch compiles none of its own modules in place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.slow
def test_config_of_a_model_compiled_in_place() -> None:
    """Compiled by name and with a Backend: the code compiled in place is used further on, and that of another backend tells nothing about this one."""
    x, quarter = torch.randn(8, 64), ALWAYS | {"ratio": 0.25}
    by_name, by_object, other = Held(mlp(64, 64, 64)), Held(mlp(64, 64, 64)), Held(mlp(64, 64, 64))
    by_name.compile(backend="approx", options=quarter)
    plans: list[Any] = []
    by_object.compile(backend=Backend(quarter, inner_compile=run_as_is, on_plan=lambda plan, before, after: plans.append(plan)))
    for model in (by_name, by_object):
        assert [s.k for s in explain(model, x).sites] == [16, 16]
        assert [s.k for s in explain(model, x, config=ALWAYS).sites] == [32, 32]
    by_object(x)
    assert [s.k for s in explain(by_object, x).sites] == [16, 16]
    with torch.compiler.set_stance("fail_on_recompile"):
        by_object(x)
    assert len(plans) == 1
    block, whole = Held(mlp(64, 64, 64)), nn.Sequential()
    block.compile(backend="eager")  # a block of a model is looked at, too
    whole.append(block)
    assert [s.k for s in explain(whole, x, config=quarter).sites] == [16, 16]
    other.compile(backend="eager")
    assert explain(other, x).sites == explain(Held(mlp(64, 64, 64)), x).sites


def test_config_of_a_compiled_function() -> None:
    w = torch.randn(64, 64, requires_grad=True)
    f = torch.compile(lambda x: x @ w, backend=Backend(ALWAYS | {"ratio": 0.25}, inner_compile=run_as_is))
    assert [s.k for s in explain(f, torch.randn(8, 64)).sites] == [16]


def test_what_else_is_asked_of_a_model_compiled_in_place(small_work_counts: None) -> None:
    """Controls and step counts belong to parameters, so the model is the same one however it is compiled."""
    model, x = Held(mlp(64, 64, 64)), torch.randn(32, 64)
    model.compile(backend=Backend(None, inner_compile=run_as_is))
    model(x).square().mean().backward()
    assert len(decisions(model).cuts) == 1 == len(state_dict(model)["controls"])
    set_step(model, 3)
    set_phase(model, "late")
    saved = state_dict(model)
    assert [(c["step"], c["phase"]) for c in saved["clocks"]] == [(3, "late")]
    again = Held(mlp(64, 64, 64))
    again.compile(backend=Backend(None, inner_compile=run_as_is))
    load_state_dict(again, saved)
    again(x).square().mean().backward()
    assert list(decisions(again).cuts) == list(decisions(model).cuts)


def test_eval_and_no_grad() -> None:
    model = mlp(64, 64, 64)
    with torch.no_grad():
        assert [s.decision for s in explain(model, torch.randn(8, 64), config=ALWAYS).sites] == ["sampled"] * 2
    report = explain(model.eval(), torch.randn(8, 64), config=ALWAYS)
    assert {s.reason for s in report.sites} == {"the module is in eval mode"}


def test_several_graphs_and_unmatched_patterns() -> None:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)

    def broken(x: Tensor) -> Tensor:
        h = a(x)
        torch._dynamo.graph_break()
        return b(h)

    report = explain(broken, torch.randn(8, 64), config=ALWAYS | {"rules": [{"layers": "b", "ratio": 0.25}, {"layers": "c", "ratio": 0.1}]})
    assert [s.k for s in report.sites] == [32, 16] and len(report.before) == 2
    assert report.unmatched == ["c"] and "'c' matches no site" in str(report)


def test_a_pattern_that_matches_nothing_is_answered_with_a_similar_name() -> None:
    model, x = nn.Sequential(), torch.randn(8, 64)
    for name in ("first", "head"):
        model.add_module(name, nn.Linear(64, 64))
    options = ALWAYS | {"rules": [{"layers": "haed", "method": "exact"}]}
    assert "'haed' matches no site. Did you mean 'head'?" in str(explain(model, x, config=options))
    with pytest.warns(ApproxWarning, match="'haed' matches no site of Sequential. Did you mean 'head'"):
        torch.compile(model, backend=Backend(options, inner_compile=run_as_is))(x)


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.eyes = nn.Linear(32, 32), nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=False).relu()
        return self.head(h) + self.eyes(h)


@pytest.mark.slow
def test_a_layer_without_a_product_is_named_where_a_rule_asks_for_it() -> None:
    """With a batch of one row, a layer with one output is no matrix product to Inductor."""
    model, x = Regression(), torch.randn(1, 32)
    model.eyes.eval()
    says = "no rule holds for head, which is exact: with one row or one input Inductor computes it without a matrix product"
    for layers, found in (("head", [says]), (["body", "eyes"], []), ("*", [says]), ("linear", [says])):
        config = {"policy": "always", "rules": [{"layers": layers, "grad_weight": "zero"}]}
        report = explain(model, x, config=config)
        assert [s.name for s in report.sites] == ["body"] and report.remarks == found
        assert (says in str(report)) == bool(found) and report.to_dict()["remarks"] == found
    assert not explain(model, x, config=config | {"rules": [{"layers": "*", "method": "exact"}]}).remarks
    assert not explain(model, torch.randn(2, 32), config=config).remarks
    alone = nn.Sequential(nn.Linear(32, 1))
    with pytest.warns(ApproxWarning, match="no rule holds for 0, which is exact"):
        torch.compile(alone, backend=Backend({"rules": [{"layers": "0", "grad_weight": "zero"}]}, inner_compile=run_as_is))(x)


def test_nothing_to_explain_and_bad_input() -> None:
    assert "No matrix product or convolution was found, so there is nothing to approximate. Look at" in str(explain(torch.relu, torch.randn(4)))
    with pytest.raises(TypeError, match="got int"):
        explain(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ratio"):
        explain(nn.Linear(4, 4), torch.randn(2, 4), config={"ratio": 2})


@pytest.mark.slow
def test_dynamic_sizes_are_shown_as_symbols() -> None:
    x = torch.randn(48, 64)
    torch._dynamo.mark_dynamic(x, 0)
    report = explain(mlp(64, 32, 8), x, config={"policy": "always", "ratio": 0.5})
    (symbol, size), *_ = report.sites[0].traced
    assert size == 48 and not symbol.isdigit()
    assert [s.shape for s in report.sites] == [f"{symbol}x64x32", f"{symbol}x32x8"]
    assert "as traced" not in str(report)
    report.verbose = True
    assert f"{symbol}x64x32" in str(report) and f"{symbol} = 48 as traced" in str(report)
    assert report.sites[0].flops_exact == 2 * 2 * 48 * 64 * 32  # the input needs no gradient
    static = explain(mlp(64, 32, 8), torch.randn(48, 64), config={"policy": "always", "ratio": 0.5})
    assert [s.shape for s in static.sites] == ["48x64x32", "48x32x8"] and static.sites[0].traced == () and "as traced" not in str(static)


def test_options_of_wrapped_and_partly_compiled_models(small_work_counts: None) -> None:
    options, x = {"policy": "always", "ratio": 0.25, "group": 1}, torch.randn(32, 64)
    backend = Backend(options, inner_compile=run_as_is)
    assert [s.k for s in explain(nn.DataParallel(torch.compile(mlp(64, 64, 64), backend=backend)), x).sites] == [16, 16]
    for inner in (torch.compile(mlp(64, 64, 64), backend=backend), mlp(64, 64, 64)):
        if not hasattr(inner, "_orig_mod"):
            inner.compile(backend=backend)
        model = nn.Sequential(nn.Linear(64, 64), inner)
        before = [m.__dict__.get("_inner_call_impl") for m in model.modules()]
        report = explain(model, x)
        assert [(s.name, s.k) for s in report.sites] == [("1.0", 16), ("1.2", 16)]  # the first layer is not compiled
        assert [m.__dict__.get("_inner_call_impl") for m in model.modules()] == before


def test_bytes_of_gradients_that_a_data_parallel_training_exchanges() -> None:
    report = explain(mlp(64, 128, 128, 10), torch.randn(32, 64), config={"policy": "always", "method": "topk_weights", "ratio": 0.5})
    whole = [128 * 64, 128, 128 * 128, 128, 10 * 128, 10]
    kept = [64 * 32, 64, 64 * 64, 64, 10 * 64, 10]
    assert (report.gradient_bytes, report.kept_bytes) == (4 * sum(whole), 4 * sum(kept))
    assert "Data parallel: 0.0277 of 0.104 MB of gradients need to be exchanged in a step" in " ".join(str(report).split())
    assert "Data parallel" not in str(explain(mlp(64, 64), torch.randn(32, 64)))
