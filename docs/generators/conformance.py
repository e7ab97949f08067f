"""The tables of library models that the conformance suite has tried, and their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from generators.stored import Row, block, rows, table

NAME = "conformance.csv"
TOKENS = "conformance_tokens.csv"


def conformance_table() -> str:
    """A line for each model: how much of its backward pass runs on some of the samples, why not more, and the checks."""
    stored = rows(NAME)
    head = ["model", "rows", "FLOPs on rows", "why not more", "default", "exact", "lin", "mean", "sizes", "verdict"]
    return block(table(head, [_line(r) for r in stored]), _conditions(stored))


def _line(r: Row) -> list[str]:
    star = "*" if r["single_precision_inside"] == "yes" else ""

    def pair(name: str) -> str:
        single, double = r[f"{name}_fp32"], r[f"{name}_fp64"]
        return single if single == double else f"{single}, {double}{star}"

    share = f"{100 * float(r['share']):.0f}%" if r["share"] else ""
    reason = "" if share == "100%" else r["reason"]
    sizes = f"{r['other_sizes']} ({r['recompiled']}, {r['recompiled_by_torch']})" if r["recompiled"] else r["other_sizes"]
    cells = [r["model"], r["decision"], share, reason, r["default_fp32"], pair("exact"), pair("lin"), pair("mean"), sizes, r["verdict"]]
    return [c.replace("|", "\\|").replace("\n", " ").replace("`", "'")[:300] for c in cells]


def _counts(stored: Sequence[Row]) -> str:
    counts = Counter(r["decision"] for r in stored)
    checked = [r for r in stored if r["verdict"] != "not checked"]
    right = sum(r["verdict"] == "right" for r in checked)
    libraries = len({r["library"] for r in stored})
    return (
        f"{len(stored)} models of {libraries} libraries: rows are on in {counts['on']}, in part in {counts['partly']}, declined in {counts['declined']}. "
        f"Of the {len(checked)} whose gradients were checked {right} are right in every check."
    )


def tokens_table() -> str:
    """A line for each model for which the default chooses tokens, with the checks of its regions."""
    stored = rows(TOKENS)
    head = ["model", "FLOPs on tokens", "regions", "exact", "mean", "default", "sizes", "verdict"]
    lines = [
        [
            *(r["model"].replace("|", "\\|"), f"{100 * float(r['share']):.0f}%", r["regions"], r["exact"], r["mean"], r["default_fp32"]),
            *(f"{r['other_sizes']} ({r['recompiled']}, {r['recompiled_by_torch']})", r["verdict"].replace("|", "\\|")),
        ]
        for r in stored
    ]
    return block(table(head, lines), _conditions(stored, TOKENS))


def _counts_of_tokens(stored: Sequence[Row]) -> str:
    right, regions = sum(r["verdict"] == "right" for r in stored), sum(int(r["regions"]) for r in stored)
    return f"{len(stored)} models for which the default chooses tokens, with {regions} regions: {right} are right in every check."


def _conditions(stored: Sequence[Row], name: str = NAME) -> str:
    dates, devices = (", ".join(sorted({v for r in stored for v in r[k].split(", ")})) for k in ("date", "device"))
    commits = ", ".join(sorted({commit for r in stored for commit in r["commit"].split()}))
    return f"{devices}, 1 thread, {stored[0]['versions'].split()[0].replace('==', ' ')}, {dates}; commits {commits}. From `benchmarks/results/{name}`."


def blocks() -> dict[str, str]:
    """The generated blocks by name."""
    return {
        "conformance in short": _counts(rows(NAME)),
        "conformance": conformance_table(),
        "conformance on tokens in short": _counts_of_tokens(rows(TOKENS)),
        "conformance on tokens": tokens_table(),
    }
