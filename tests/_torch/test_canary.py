"""The table of torch's private names holds every name that the package uses, this torch has all of them, and a missing name is reported at import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import approx_compile
from approx_compile._torch.canary import NAMES, exists, missing

PACKAGE = Path(approx_compile.__file__).parent
TREES = {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text()) for p in PACKAGE.rglob("*.py") if p.name != "canary.py"}
PYTHONS_OWN = {"_asdict", "_replace", "_getframe", "_member_map_", "_member_names_", "_name_", "_value_", "_value2member_map_"}
OF_OTHER_LIBRARIES = {"_strategy"}
"""Private attributes of other libraries, which the tests of `integrations` read."""
TABLE = [n.name.replace(":", ".") for n in NAMES]
WORDS = {n.name.replace(":", ".").rpartition(".")[2] for n in NAMES}


def is_private(name: str) -> bool:
    return any(re.match(r"_[^_]", part) for part in name.split(".")) or name.startswith(("torch.fx.experimental", "functorch"))


def chain(node: ast.expr) -> list[str]:
    """Return the parts of `a.b.c`; nothing for an attribute of an expression that is not a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    return [node.id, *parts] if isinstance(node, ast.Name) else []


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Return (local name, dotted name) of everything that a module imports from torch, and of the op namespaces that it abbreviates."""
    yield from (("aten", "torch.ops.aten"), ("prims", "torch.ops.prims"))
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from ((a.asname or a.name.partition(".")[0], a.name if a.asname else a.name.partition(".")[0]) for a in n.names)
            yield from ((a.name, a.name) for a in n.names)
        elif isinstance(n, ast.ImportFrom) and n.module is not None:
            yield from ((a.asname or a.name, f"{n.module}.{a.name}") for a in n.names)


def names_used(tree: ast.AST) -> set[str]:
    """Return the private names of torch that a module imports or reaches by attributes."""
    known = {local: name for local, name in imported(tree) if name.partition(".")[0] in ("torch", "functorch")}
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    chains = [chain(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in inner]
    reached = {".".join([known[c[0]], *c[1:]]) for c in chains if c and c[0] in known}
    return {n for n in reached | set(known.values()) if is_private(n)}


def attributes_used(tree: ast.AST) -> set[str]:
    """Return the private attributes that a module reads of objects other than `self`, written as attributes or as text for getattr."""
    known = dict(imported(tree))
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Attribute) and (c := chain(n))[:1] != ["self"] and not (c and c[0] in known):
            found.add(n.attr)
        elif (
            isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in ("getattr", "hasattr", "setattr") and isinstance(n.args[1], ast.Constant)
        ):
            found.add(str(n.args[1].value))
    return {a for a in found if is_private(a)}


def defined(tree: ast.AST) -> set[str]:
    """Return the functions, fields and attributes that a module defines itself."""
    found = set()
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            found.add(n.name)
        elif isinstance(n, (ast.Name, ast.Attribute)) and isinstance(n.ctx, ast.Store):
            found.add(n.id if isinstance(n, ast.Name) else n.attr if chain(n)[:1] in (["self"], ["cls"]) else "")
    return found


def matches(used: str, listed: str) -> bool:
    return f"{used}.".startswith(f"{listed}.") or f"{listed}.".startswith(f"{used}.")


# --- the table and the sources ---


def test_every_name_is_in_the_table() -> None:
    used = {(name, file) for file, tree in TREES.items() for name in names_used(tree)}
    assert [(name, file) for name, file in sorted(used) if not any(matches(name, t) for t in TABLE)] == []


def test_every_attribute_is_in_the_table() -> None:
    own = set().union(*map(defined, TREES.values())) | PYTHONS_OWN
    used = {(a, file) for file, tree in TREES.items() for a in attributes_used(tree)}
    assert [(a, file) for a, file in sorted(used) if a not in WORDS | own | OF_OTHER_LIBRARIES] == []


def test_every_name_of_the_table_is_used() -> None:
    """The last part of every name in the table occurs in the package: as an attribute, an argument, an import or text."""
    written: set[str | None] = set()
    for n in (n for tree in TREES.values() for n in ast.walk(tree)):
        match n:
            case ast.Attribute(attr=name) | ast.keyword(arg=name):
                written.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                written.update(a.name for a in names)
            case ast.Constant(value=str(text)):
                written.update(word.rstrip("_") for word in re.findall(r"\w+", text))
    assert [n.name for n in NAMES if re.split(r"[.:]", n.name)[-1].rstrip("_") not in written] == []


def test_names_are_there_once_each() -> None:
    assert len({n.name for n in NAMES}) == len(NAMES)
    assert missing() == []


def test_each_says_what_it_is_for() -> None:
    assert all(n.used_for and (n.fallback is None or len(n.fallback) > 10) for n in NAMES)


# --- how a name is looked up ---


@pytest.mark.parametrize(
    "name",
    [
        "torch._dynamo.gone",
        "torch._dynamo.exc.Gone",
        "torch._dynamo.gone.module",
        "torch._gone",
        "torch._inductor.compile_fx.gone_for_good",
        "torch._inductor.gone.compile_fx",
        "functorch.gone.make_boxed_func",
        "torch._dynamo.output_graph.OutputGraph:gone_for_good",
        "torch._functorch.partitioners:gone_for_good",
        "torch._C._gone",
    ],
)
def test_what_is_not_there(name: str) -> None:
    assert not exists(name)


# --- a name that is gone ---


def child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_nothing_is_imported_for_the_check() -> None:
    code = "import sys, approx_compile; from approx_compile._torch import canary; n = len(sys.modules); canary.check(); assert len(sys.modules) == n"
    assert child(code).returncode == 0


@pytest.mark.slow
def test_an_import_fails_without_what_gradients_rest_on() -> None:
    """Without this name no layer and no mode would be known, so a model in eval mode could be sampled."""
    result = child(
        "import torch._dynamo.symbolic_convert as s\ndel s.InstructionTranslator.current_tx\nimport approx_compile",
    )
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("ImportError")]
    assert result.returncode == 1 and "InstructionTranslator.current_tx (the frame being compiled)" in line and torch.__version__ in line


FALLBACK = """
import torch._dynamo.convert_frame, torch._inductor.compile_fx
torch._dynamo.list_backends()  # its modules are loaded before the name is gone
del torch._dynamo.exc.TensorifyScalarRestartAnalysis
import approx_compile
from approx_compile.backend import run_as_is
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
x = torch.randn(512, 256)
def gradient(run):
    model.zero_grad()
    run(x).square().mean(dim=1).sum().backward()
    return model[0].weight.grad.clone()
want, got = gradient(model), gradient(torch.compile(model, backend=approx_compile.Backend(inner_compile=run_as_is)))
print("exact", torch.allclose(got, want, rtol=1e-4, atol=1e-5))
"""


@pytest.mark.slow
def test_one_warning_and_exact_gradients_without_what_rows_need() -> None:
    """Dynamo cannot be asked for a symbol without this name, so no rows of the batch are sampled."""
    result = child(FALLBACK)
    assert result.stdout == "exact True\n", result.stderr
    warned = [line for line in result.stderr.splitlines() if "private names" in line]
    assert len(warned) == 1 and "torch._dynamo.exc.TensorifyScalarRestartAnalysis: no symbol is asked for the batch's size" in warned[0]
