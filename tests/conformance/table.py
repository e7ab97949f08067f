"""The results as a CSV, from which `docs/generate.py` makes the table of the documentation."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models

LIMITS = {"fp32": 1e-4, "fp64": 1e-9, "narrow": 1e-5}
"""Relative errors; `narrow`: of double precision where the model itself computes in single precision."""

COLUMNS = (
    "date commit device library model versions decision share reason graphs first_call_approx first_call_inductor default_fp32 exact_fp32 exact_fp64 lin_fp32 "
    "lin_fp64 mean_fp32 mean_fp64 other_sizes recompiled recompiled_by_torch inductor_gradients random_stream warnings marks single_precision_inside verdict"
).split()
DISTRIBUTIONS = {"vit_pytorch": "vit-pytorch", "x_transformers": "x-transformers", "pytorch_tabnet": "pytorch-tabnet"}


def slug(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def line(result: Mapping[str, Any]) -> str:
    """A result in a line, for the terminal."""
    if "died" in result:
        return f"DIED: {result['died']}"
    flat = {k: v for name, r in result.items() if not name.endswith("seconds") for k, v in (_named(name, r)).items() if k != "ops"}
    return ", ".join(f"{k}: {_short(v)}" for k, v in flat.items())


def _named(name: str, result: Any) -> dict[str, Any]:
    return {f"{k} {name.split()[-1]}" if name.startswith("half") else k: v for k, v in result.items()} if isinstance(result, dict) else {name: result}


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], float):
        return f"{value[0]:.1e}" + (f" at {value[1]}" if value[0] > 1e-6 else "")
    return str(value)


def row(model: models.Model, kept: Path) -> dict[str, Any] | None:
    """One model's row of the CSV, with what its results come to; None if it has not been run."""
    found: dict[str, Any] = {}
    conditions: dict[str, str] = {}
    commits: list[str] = []
    died = []
    for path in sorted(p for p in (kept / slug(model.name)).glob("*.json") if p.stem != "tokens"):
        stored = json.loads(path.read_text())
        result = stored["result"]
        conditions |= stored.get("conditions", {})
        commits.append(conditions.get("commit", ""))
        died += [f"{path.stem}: {result['died']}"] if "died" in result else []
        for name, value in result.items():
            found |= _named(name, value)
    if not found:
        return None
    conditions["commit"] = " ".join(dict.fromkeys(commits))
    narrow = found.get("narrow") is True
    out: dict[str, Any] = dict.fromkeys(COLUMNS, "") | conditions | {"library": model.library, "model": model.name, "versions": _versions(model.library)}
    bad = [*died]

    def number(column: str, key: str, limit: float) -> None:
        value = found.get(key)
        if isinstance(value, list):
            out[column] = f"{value[0]:.1e}"
            if not value[0] <= limit:
                bad.append(f"{column} {value[0]:.1e} at {value[1]}")
        elif value is not None:
            out[column] = value
            if str(value).startswith("raises"):
                bad.append(f"{column} {value}")

    out |= {"decision": found.get("decision", "not run"), "share": found.get("share", ""), "reason": found.get("reason", ""), "graphs": found.get("graphs", "")}
    limits: dict[str, float] = {}
    for dtype in ("fp32", "fp64"):
        limit = limits[dtype] = max(LIMITS["narrow" if narrow and dtype == "fp64" else dtype], 2 * found.get(f"torch {dtype}", [0.0])[0])
        number(f"exact_{dtype}", f"exact {dtype}", limit)
        number(f"lin_{dtype}", f"lin {dtype}", limit)
        number(f"mean_{dtype}", f"mean {dtype}", max(limit, 4 * found.get(f"exact {dtype}", [0.0])[0]))  # weights enlarge the rounding of each of its parts
        if isinstance(half := found.get(f"half {dtype}"), str):
            out[f"lin_{dtype}"] = half
            bad.append(f"half {dtype} {half}")
    number("default_fp32", "default fp32", limits["fp32"])
    number("other_sizes", "other sizes", max(limits["fp32"], 2 * found.get("torch other sizes", [0.0])[0]))
    number("inductor_gradients", "approx gradients", 1e-3)
    if isinstance(failed := found.get("default"), str):
        out["default_fp32"] = failed
        bad.append(f"default: {failed}")
    if isinstance(failed := found.get("approx"), str) and not isinstance(found.get("inductor"), str):
        bad.append(f"first call: {failed}")
    for name in ("decide", "inductor", "approx"):
        if isinstance(found.get(name), str):
            out["reason" if name == "decide" else f"first_call_{name}"] = found[name]
    out["first_call_approx"] = found.get("approx first call", out["first_call_approx"])
    out["first_call_inductor"] = found.get("inductor first call", out["first_call_inductor"])
    out["recompiled"], out["recompiled_by_torch"] = found.get("recompiled", ""), found.get("recompiled by torch", "")
    if isinstance(out["recompiled_by_torch"], int) and found["recompiled"] > out["recompiled_by_torch"]:
        bad.append(f"{found['recompiled']} recompiled, torch {found['recompiled by torch']}")
    for column, key, good in (("random_stream", "random stream fp32", "as eager"), ("warnings", "warnings fp32", "none"), ("marks", "marks fp32", "none")):
        out[column] = found.get(key, "")
        if out[column] not in ("", good):
            bad.append(f"{key.removesuffix(' fp32')}: {out[column]}")
    out["single_precision_inside"] = "yes" if narrow else "no"
    out["verdict"] = "; ".join(bad) or ("right" if out["default_fp32"] != "" else "not checked")
    return out


TOKEN_COLUMNS = (
    "date commit device library model versions axis share regions exact mean default_fp32 other_sizes recompiled recompiled_by_torch verdict".split()
)


def token_row(model: models.Model, kept: Path) -> dict[str, Any] | None:
    """One model's row of the CSV of tokens; None if they have not been run."""
    path = kept / slug(model.name) / "tokens.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    found = {k: v for part in stored["result"].values() if isinstance(part, dict) for k, v in part.items()}
    bad = [f"{name}: {v}" for name, v in stored["result"].items() if isinstance(v, str)]
    out = dict.fromkeys(TOKEN_COLUMNS, "") | stored["conditions"] | {"library": model.library, "model": model.name, "versions": _versions(model.library)}
    out |= {"axis": found.get("axis", ""), "share": found.get("share on it", ""), "regions": found.get("regions", "")}
    limits = {"exact": LIMITS["narrow"], "mean": LIMITS["narrow"], "default_fp32": LIMITS["fp32"], "other_sizes": LIMITS["fp32"]}
    for column, key in (("exact", "exact tokens"), ("mean", "mean tokens"), ("default_fp32", "default fp32"), ("other_sizes", "other sizes")):
        if key in found:
            value, where = found[key]
            out[column] = f"{value:.1e}"
            bad += [f"{column} {value:.1e} at {where}"] if not value <= limits[column] else []
    out["recompiled"], out["recompiled_by_torch"] = found.get("recompiled", ""), found.get("recompiled by torch", "")
    if isinstance(out["recompiled_by_torch"], int) and out["recompiled"] > out["recompiled_by_torch"]:
        bad.append(f"{out['recompiled']} recompiled, torch {out['recompiled_by_torch']}")
    return out | {"verdict": "; ".join(bad) or "right"}


def _versions(library: str) -> str:
    names = dict.fromkeys(("torch", DISTRIBUTIONS.get(library, library)))
    return " ".join(f"{n}=={importlib.metadata.version(n)}" for n in names)


def write(root: Path, kept: Path) -> None:
    for name, columns, make in (("conformance", COLUMNS, row), ("conformance_tokens", TOKEN_COLUMNS, token_row)):
        rows = [r for m in models.MODELS.values() if (r := make(m, kept)) is not None]
        with (root / "benchmarks" / "results" / f"{name}.csv").open("w", newline="") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
