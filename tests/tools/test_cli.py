"""The command line: its output, its exit codes, and one line on stderr for everything that goes wrong."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from approx_compile import ApproxConfig, Backend, ConfigError, machine
from approx_compile.backend import run_as_is
from approx_compile.tools.cli import app, read_options
from approx_compile.tools.compare import Timing, loss_of, race
from approx_compile.tools.model_loader import FactoryError, load
from approx_compile.utils import MACHINE

FACTORIES = """
import torch
from torch import nn

class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    @torch.compiler.disable
    def forward(self, x):
        return self.layer(x)

class Keyword(nn.Linear):
    def forward(self, *, data):
        return super().forward(data)

def make():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), (torch.randn(8, 64),)

def four():
    layers = [m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(32, 64)

def bare_tensor():
    return nn.Linear(64, 64), torch.randn(8, 64)

def keywords():
    return Keyword(64, 64), {"data": torch.randn(8, 64)}

def no_products():
    return nn.ReLU(), torch.randn(8, requires_grad=True)

def hidden():
    return Hidden(), torch.randn(8, 64)

def behind_a_break():
    return nn.Sequential(Hidden(), nn.ReLU(), Hidden()), torch.randn(8, 64)

def wrong_shape():
    return nn.Linear(64, 64), torch.randn(8, 63)

def raises():
    raise RuntimeError("first line\\nsecond line")

def leaves():
    raise SystemExit("no data here")

def only_a_model():
    return nn.Linear(64, 64)

def not_callable():
    return {}, ()

def number():
    return nn.Linear(64, 64), 3

a_number = 3
"""
ALWAYS = ["--set", "policy=always"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with the factories and a package; modules that a run has imported from it are removed afterwards."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "models.py").write_text("from factories import make\n")
    (tmp_path / "lacks.py").write_text("import not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("factories", "a_package", "lacks"):
            del sys.modules[name]


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, list(words), prog_name="approx-compile")


def failed(code: int, *words: str) -> str:
    """Return the one line on stderr of a run that must fail."""
    done = invoke(*words)
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("approx-compile: ")
    return line.removeprefix("approx-compile: ")


# --- explain ---


@pytest.mark.slow
def test_explain_table_json_graphs_and_page(folder: Path) -> None:
    done = invoke("explain", "factories.py:make", *ALWAYS, "--set", "ratio=0.25", "--html", "report.html", "--graphs")
    assert done.exit_code == 0, done.output
    assert "16 of 64" in done.stdout and "Forward: SAMPLED in 2 of 2 layers (topk)" in done.stdout and "written: report.html" in done.stdout
    before, after = done.stdout.split("# --- graph 1, after ---")
    assert "aten.topk" in after and "aten.topk" not in before and "aten.addmm" in before
    assert "16 of 64" in (folder / "report.html").read_text()
    done = invoke("explain", "factories.py:make", *ALWAYS, "--json")
    content = json.loads(done.stdout)
    assert [(s["name"], s["k"]) for s in content["sites"]] == [("0", 32), ("2", 32)] and "before" not in content
    assert content["flops_sampled"] == sum(p["flops_sampled"] for s in content["sites"] for p in s["products"].values())
    content = json.loads(invoke("explain", "a_package.models:make", "--json", "--graphs").stdout)
    assert len(content["sites"]) == 2 and len(content["before"]) == len(content["after"]) == content["graphs"] == 1


@pytest.mark.parametrize(("factory", "sites"), [("bare_tensor", 1), ("keywords", 1), ("no_products", 0)])
def test_forms_of_inputs(factory: str, sites: int) -> None:
    done = invoke("explain", f"factories:{factory}", "--json")
    assert done.exit_code == 0 and len(json.loads(done.stdout)["sites"]) == sites


@pytest.mark.parametrize("factory", ["hidden", "behind_a_break"])
@pytest.mark.parametrize("command", ["explain", "bench"])
def test_products_behind_graph_breaks(command: str, factory: str) -> None:
    line = failed(1, command, f"factories.py:{factory}")
    assert "none of the model's products" in line and "TORCH_LOGS=graph_breaks" in line


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("factories", "package.module:factory or path/to/file.py:factory"),
        (":make", "package.module:factory"),
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("nowhere.models:make", "importing nowhere.models failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("lacks.py:make", "importing lacks.py failed: ModuleNotFoundError: No module named 'not_installed'"),
        ("factories.py:maker", "has no function 'maker'. Did you mean 'make'? It has make, four, bare_tensor,"),
        ("factories.py:a_number", "has no function 'a_number'. Did you mean 'number'? It has make, four,"),
        ("factories.py:raises", "raised RuntimeError: first line second line"),
        ("factories.py:leaves", "raised SystemExit: no data here"),
        ("factories.py:only_a_model", "returned Linear; (model, example_inputs) is expected"),
        ("factories.py:not_callable", "returned a tuple of dict, tuple"),
        ("factories.py:number", "returned int as example inputs"),
        ("factories.py:wrong_shape", "the model fails on its example inputs: RuntimeError: mat1 and mat2"),
    ],
)
def test_bad_factory(spec: str, said: str) -> None:
    assert said in failed(2, "explain", spec)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "ratio=2"], "ratio: got 2"),
        (["--set", "ratoi=0.5"], "did you mean 'ratio'?"),
        (["--set", "ratio"], "KEY=VALUE is expected"),
        (["--set", "ratio="], "KEY=VALUE is expected"),
        (["--set", "=1"], "KEY=VALUE is expected"),
        (["--config", "none.toml"], "none.toml can't be read"),
        (["--config", "factories.py"], "factories.py is no TOML"),
    ],
)
def test_bad_config(words: list[str], said: str) -> None:
    assert said in failed(2, "explain", "factories.py:make", *words)


def test_unwritable_page_and_debug(folder: Path) -> None:
    assert "there is no folder nowhere; make it" in failed(2, "explain", "factories.py:make", "--html", "nowhere/report.html")
    assert "is a folder; the name of a file is expected" in failed(2, "explain", "factories.py:make", "--html", str(folder))
    done = invoke("explain", "factories.py:raises", "--debug")
    assert isinstance(done.exception, FactoryError) and isinstance(done.exception.__cause__, RuntimeError)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPROX_COMPILE_DISABLE", "1")
    assert "APPROX_COMPILE_DISABLE=1 is set" in failed(1, "explain", "factories.py:make")


def test_help_version_and_usage() -> None:
    for words, said in ((["--help"], "bench"), (["explain", "--help"], "train.py:example --html report.html"), (["bench", "--help"], "--threads 2")):
        done = invoke(*words)
        assert done.exit_code == 0 and said in done.stdout
    assert invoke("--version").stdout.strip() == "0.1.0"
    assert invoke("explain").exit_code == invoke("bench", "x:y", "--repeats", "0").exit_code == invoke("nothing").exit_code == 2


# --- options ---


def test_options_from_file_and_settings(folder: Path) -> None:
    assert read_options(None, []) is None
    (folder / "approx.toml").write_text('policy = "always"\nratio = 0.5\n[grad]\naxis = "rows"\nratio = 0.25\n[[rules]]\nlayers = "fc*"\nmethod = "exact"\n')
    given = read_options(folder / "approx.toml", ["ratio=0.125", "grad.ratio=0.5", "output=topk", "grad.method = wta", 'rules=[{layers=["a"], ratio=0.75}]'])
    assert given == ApproxConfig(
        policy="always",
        ratio=0.125,
        output="topk",
        grad={"axis": "rows", "ratio": 0.5, "method": "wta"},
        rules=[{"layers": ["a"], "ratio": 0.75}],
    )
    with pytest.raises(ConfigError, match="grad"):
        read_options(None, ["grad.axis=columns"])


# --- bench ---


@pytest.mark.slow
def test_bench(folder: Path) -> None:
    threads = torch.get_num_threads()
    try:
        done = invoke("bench", "factories.py:bare_tensor", *ALWAYS, "--repeats", "3", "--threads", "1", "--json")
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["repeats"], found["threads"], found["sites"], found["sampled"], found["torch"]) == (3, 1, 1, 1, torch.__version__)
    assert found["device"] and 0 < found["approx"]["p20_ms"] <= found["approx"]["median_ms"] <= found["approx"]["p80_ms"]
    assert found["speedup"] == found["inductor"]["median_ms"] / found["approx"]["median_ms"]


def test_in_turn_after_warming_up() -> None:
    order: list[str] = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4 and [len(t) for t in times.values()] == [3, 3]
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Timing(3.5, 2.0, 5.0) and Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)


def test_loss_of_an_output() -> None:
    class Output:
        loss = torch.tensor(3.0, requires_grad=True)

    x = torch.tensor([1.0, 3.0], requires_grad=True)
    one: Tensor = torch.tensor(7.0, requires_grad=True)
    assert loss_of(Output()) is Output.loss and loss_of({"loss": one, "logits": x}) is one and loss_of(one) is one
    assert loss_of((x, {"y": x}, torch.tensor([1]))).item() == 10.0
    with pytest.raises(ValueError, match="no training step"):
        loss_of(torch.ones(3))


def test_factory_is_called_once_and_may_use_what_is_beside_it(folder: Path) -> None:
    (folder / "beside").mkdir()
    (folder / "beside" / "helper.py").write_text("width = 64\n")
    (folder / "beside" / "main.py").write_text(
        "import torch, helper\ncalls = []\ndef make():\n    calls.append(1)\n    return torch.nn.Linear(helper.width, 2), ()\n"
    )
    example = load("beside/main.py:make")
    assert example.model.in_features == 64 and example.args == ()
    assert sys.modules.pop("main", None) is not None and sys.modules.pop("helper").width == 64


# --- tune, calibrate ---


@pytest.mark.slow
def test_explain_costs_and_steps(folder: Path) -> None:
    (folder / "steps.toml").write_text('policy = "always"\nmethod = "exact"\n[[rules]]\nsteps = "1::2"\nmethod = "topk"\n')
    done = invoke("explain", "factories.py:make", "--config", "steps.toml")
    assert done.exit_code == 0 and "Forward: exact. Backward: exact." in done.stdout and "the first of 2 assignments" in done.stdout
    assert "Forward: SAMPLED in 2 of 2 layers" in invoke("explain", "factories.py:make", "--config", "steps.toml", "--step", "3").stdout
    assert "product: " in invoke("explain", "factories.py:make", *ALWAYS, "--costs").stdout


@pytest.mark.slow
def test_tune_writes_a_plan_that_explain_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed runs op by op, because Inductor would compile some dozens of kernels for it."""
    monkeypatch.setattr(Backend, "__init__", functools.partialmethod(Backend.__init__, inner_compile=run_as_is))
    done = invoke("tune", "factories.py:make", *ALWAYS, "--max-error", "5", "--budget", "1", "--no-rows", "--out", "plan.toml", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {s["name"] for s in found["tuned"]["sites"]} == {"0", "2"}
    done = invoke("explain", "factories.py:make", "--set", 'plan="plan.toml"')
    assert done.exit_code == 0 and done.stdout.startswith("Forward: ")
    assert "keyword" in failed(2, "tune", "factories.py:keywords")
    assert "there is no folder" in failed(2, "tune", "factories.py:make", "--out", "nowhere/plan.toml")
    assert "max_error" in failed(2, "tune", "factories.py:make", "--max-error", "-1")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_tune_names_sites_by_their_sizes(folder: Path) -> None:
    settings = ["--set", "min_k=8", "--set", "group=1"]  # of what tune samples: no keys without effect
    done = invoke("tune", "factories.py:four", *settings, "--max-error", "5", "--budget", "60", "--threads", "1", "--json")
    found = json.loads(done.stdout)["tuned"]
    assert [s["shape"] for s in found["sites"]] == ["32x64x64"] * 3 + ["32x64x10"]  # rows make the batch a symbol
    assert "the time budget is 60 s" in done.stderr


@pytest.mark.slow
def test_calibrate_stores_a_profile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    done = invoke("calibrate", "--quick", "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["device"] == "cpu" and found["quick"] and len(found["tables"]) > 10
    (stored,) = (folder / "cache").rglob("*.json")
    assert json.loads(stored.read_text()) == found
    assert "device" in failed(2, "calibrate", "--device", "tpu")
    wrong = invoke("calibrate", "--float32", "tf32")
    assert wrong.exit_code == 2 and "highest" in wrong.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_calibrations_of_two_precisions_stand_side_by_side(precisions: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name, end in (("highest", f"{torch.__version__}.json"), ("medium", f"{torch.__version__}-matmul-bf16.json")):
        assert invoke("calibrate", "--quick", "--device", "cpu", "--float32", name).exit_code == 0
        assert machine.path_of("cpu").name.endswith(end) and machine.path_of("cpu").exists()
        with monkeypatch.context() as m:
            m.delenv(MACHINE.name)
            assert machine.current("cpu") == machine.load(machine.path_of("cpu"))
    assert len(list((folder / "cache").rglob("*.json"))) == 2
