"""The registry of reasons: every entry is used and renders with its fields, and every text that reports show comes from it."""

from __future__ import annotations

import ast
import copy
import functools
import json
import pickle
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

import approx_compile
from approx_compile.reasons import MODULES, REGISTRY, Reason, join, templates
from approx_compile.reasons.decisions import ROWS_END, WHOLE_BACKWARD
from approx_compile.reasons.products import EVAL_MODE, FEW_CHANNELS, WOULD_NOT_PAY
from approx_compile.reasons.reason import NOTHING_TO_DO
from approx_compile.reasons.rows import CROSS_SAMPLE, UNKNOWN_OP

PACKAGE = Path(approx_compile.__file__).parent
CONSTANTS = {name: template for module in MODULES for name, template in templates(module).items()}


class Anything:
    """Stands for a value of any type in a template."""

    def __format__(self, spec: str) -> str:
        return "ANY"


@dataclass(frozen=True)
class Decided:
    reason: Reason


@functools.cache
def nodes() -> list[tuple[str, ast.AST]]:
    """The calls, arguments, functions and annotated names of the package, each with its file."""
    kinds = (ast.Call, ast.arg, ast.FunctionDef, ast.AnnAssign)
    files = [(path.relative_to(PACKAGE).as_posix(), path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]
    return [(file, n) for file, text in files for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)]


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call of a plain name in the package: the file, the name and the call."""
    yield from ((file, n.func.id, n) for file, n in nodes() if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))


def test_ids_and_constants_are_unique_names() -> None:
    listed = [t for module in MODULES for t in templates(module).values()]
    assert len(listed) == len(REGISTRY) == len(CONSTANTS)
    assert all(set(t.id) <= set(string.ascii_lowercase + string.digits + "-") for t in listed)


def test_every_entry_renders_with_its_fields() -> None:
    for template in REGISTRY.values():
        reason = template(**dict.fromkeys(template.fields, Anything()))
        assert reason.count("ANY") == len(template.fields) and not set(reason) & set("{}") and reason.ids == (template.id,)
    with pytest.raises(KeyError):
        FEW_CHANNELS(size=256)


def test_what_stays_exact_has_an_advice_and_what_is_done_has_none() -> None:
    for module in MODULES:
        described = module.__name__.endswith(".decisions")
        for t in templates(module).values():
            assert bool(t.advice) != described, t.id
            assert described or (t.advice[-1] == "." and t.advice.removeprefix(NOTHING_TO_DO) != ""), t.id


def test_every_entry_is_used_and_gets_exactly_its_fields() -> None:
    used = set()
    for file, name, call in calls():
        if name in CONSTANTS:
            used.add(name)
            given = sorted(str(k.arg) for k in call.keywords)
            assert not call.args and given == sorted(CONSTANTS[name].fields), f"{file}:{call.lineno}"
    assert used == set(CONSTANTS)


def test_only_templates_make_reasons() -> None:
    """Together with mypy, which checks that what plans, cuts and products show is a `Reason`, this makes the registry complete."""
    assert {file.split("/")[0] for file, name, _ in calls() if name in ("Reason", "Template")} == {"reasons"}
    assert {file for file, name, _ in calls() if name == "Reason"} == {"reasons/reason.py"}


AS_TEXT = {"config/plan_file.py", "kernels/triton/conv_launch.py", "tools/report/report_text.py"}
"""Files whose reasons are plain text: a plan file stores text, why a kernel takes no operands of some kind is told to the caller, and a table is text."""


def test_reasons_are_annotated_as_such() -> None:
    """No field, argument or function that is named after reasons is plain text, which mypy would accept everywhere."""
    plain = set()
    for file, n in nodes():
        name, annotation = "", None
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name):
            name, annotation = n.target.id, n.annotation
        elif isinstance(n, ast.arg):
            name, annotation = n.arg, n.annotation
        elif isinstance(n, ast.FunctionDef):
            name, annotation = n.name, n.returns
        of_reasons = {"reason", "refusal", "blocked"} & set(name.split("_"))
        if of_reasons and annotation is not None and "str" in ast.unparse(annotation) and "Reason" not in ast.unparse(annotation):
            plain.add(file)
    assert plain == AS_TEXT


def test_a_reason_is_its_text_and_keeps_its_causes() -> None:
    reason = FEW_CHANNELS(size=256, least=512)
    assert reason == "256 contraction channels, fewer than the 512 of the default" and json.loads(json.dumps(reason)) == reason
    for same in (pickle.loads(pickle.dumps(reason)), copy.deepcopy(reason), asdict(Decided(reason))["reason"]):
        assert type(same) is Reason and (same, same.causes) == (reason, reason.causes)
    assert {reason: 1}[str(reason)] == 1 and str(EVAL_MODE()) == "the module is in eval mode"


def test_reasons_inside_reasons() -> None:
    blocked = [CROSS_SAMPLE().at("norm, model.py:3, self.norm(x)"), UNKNOWN_OP(op="aten.sort")]
    reason = ROWS_END(stops=join(blocked))
    assert reason.ids == ("rows-end", "cross-sample", "unknown-op") and reason.advice == (CROSS_SAMPLE.advice, UNKNOWN_OP.advice)
    assert reason.startswith("rows end where a sum over the batch goes back to its rows, as in BatchNorm (at norm, model.py:3, self.norm(x)); aten.sort is not")
    assert CROSS_SAMPLE.explains(reason) and not EVAL_MODE.explains(reason) and not CROSS_SAMPLE.explains(str(reason)) and not CROSS_SAMPLE.explains(None)
    assert join((reason, reason)).ids == reason.ids and reason.at("") is reason
    assert WOULD_NOT_PAY(words=WHOLE_BACKWARD(), missed="").advice == ()  # there is nothing to do
