"""The fields of plan files and reports, from the classes that hold them, and an example of a plan file."""

from __future__ import annotations

from approx_compile import TunedPlan
from approx_compile.config.plan_file import Tuned, TunedSite
from approx_compile.passes.planning.plan import BreakEven, ProductPlan, RowCut
from approx_compile.tools.report.report_data import ReportData, SiteReport
from generators import fields

SITES = (
    TunedSite(name="0", op="addmm", shape="256x784x1024", dtype="float32", ratio=0.5, saved=0.125, error=0.31),
    TunedSite(name="2", op="addmm", shape="256x1024x10", dtype="float32", reason="gradient error 0.83 at 0.7"),
)
RECORD = Tuned(
    model="Sequential", torch="2.13.0", device="cpu", threads=1, max_error=0.5, error=0.31, predicted_speedup=1.14, achieved_speedup=1.12, sites=SITES
)
OPTIONS = {"policy": "always", "method": "exact", "rules": [{"layers": "0", "method": "topk", "ratio": 0.5}]}
REASONS = (
    ("reason_ids", "In JSON: the ids of the reasons in `reason`, which [reasons](reasons.md) lists."),
    ("advice", "In JSON: what the user can do about them."),
)


def plan_example() -> str:
    """A plan file, which is read back to make sure that it is one."""
    plan = TunedPlan(OPTIONS, RECORD, {"0": "saves 12.5% of the step, gradient error 0.31 alone"})
    text = plan.to_toml()
    return f"```toml\n{text.strip()}\n```"


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    json_only = [
        (
            "graphs",
            "In JSON: how many joint graphs there are. `before` and `after` are left out, unless `approx-compile explain --json --graphs` asks for them.",
        ),
        ("flops_exact", "FLOPs of all sites in an exact training step."),
        ("flops_sampled", "FLOPs of all sites in a step as planned, the sampling included."),
    ]
    return {
        "plan file: example": plan_example(),
        "plan file: tuned": fields.table(Tuned),
        "plan file: tuned.sites": fields.table(TunedSite),
        "report": fields.table(ReportData, json_only),
        "report: sites": fields.table(SiteReport, REASONS),
        "report: products": fields.table(ProductPlan, REASONS),
        "report: cuts": fields.table(RowCut, REASONS),
        "report: break_even": fields.table(BreakEven),
    }
