"""Tables of times and of memory: rows, sampled products, library models, compilation, `tune`."""

from __future__ import annotations

from collections.abc import Sequence

from generators.stored import RESULTS, Row, block, by, caption, explained, mark, newest, newest_commit, rows, table, times

KEPT = ("0.5", "0.25", "0.1", "adaptive")


def _of_share(row: Row) -> str:
    """The speed-up with a share of the samples, or of the default while it keeps all."""
    return times(row) + (mark(row) if row["setting"] == "adaptive" else "")


def rows_table() -> str:
    """A training step with some of the rows, beside Inductor: of every piece of work the commit that measured it last."""
    lines, used = [], []
    for work, stored in by(rows("rows.csv"), lambda r: r["work"]).items():
        last = newest_commit([r for r in stored if "," not in r["device"]], "setting")
        settings = {r["setting"]: r for r in last}
        lines.append([work, *(_of_share(settings[s]) if s in settings else "not sampled" for s in KEPT), last[0]["commit"]])
        used += last
    what = (
        "Speed of a training step without the optimizer, as times Inductor's (median, 20th to 80th percentile), with a share of the samples in the "
        "backward pass. "
        "Inductor and approx are timed in turn in one process."
    )
    what = explained(what, (r for r in used if r["setting"] == "adaptive"))
    return block(table(["work", "half", "a quarter", "a tenth", "all (default at its worst)", "commit"], lines), caption(what, used, "rows.csv"))


def allocator_table() -> str:
    """The same with settings of the memory allocator, which are stored beside the device."""
    stored = [r for r in rows("rows.csv") if "," in r["device"]]
    lines = []
    for (work, condition), group in by(stored, lambda r: (r["work"], r["device"])).items():
        settings = {r["setting"]: r for r in group}
        environment = "<br>".join(f"`{part}`" for part in condition.split(", ")[1:])
        lines.append([work, environment, *(_of_share(settings[s]) for s in KEPT), group[0]["commit"]])
    what = "The same with settings of the memory allocator in the environment, for Inductor and approx alike."
    what = explained(what, (r for r in stored if r["setting"] == "adaptive"))
    return block(table(["work", "environment", "half", "a quarter", "a tenth", "all", "commit"], lines), caption(what, stored, "rows.csv"))


def forward_table() -> str:
    """Every site sampled in the forward pass, beside Inductor."""
    lines, used = [], []
    for (work, _), group in by(rows("speed.csv"), lambda r: (r["work"], r["threads"])).items():
        last = newest_commit(group, "setting")
        settings = {r["setting"]: r for r in last}
        cells = [times(settings[s]) if s in settings else "not run" for s in ("0.5", "0.25", "0.5 by weight")]
        lines.append([work, last[0]["threads"], *cells, last[0]["commit"]])
        used += last
    what = "Speed of a training step without the optimizer, as times Inductor's, with every site sampled: policy `always`, sampling `forward`."
    return block(
        table(["work", "threads", "`topk`, ratio 0.5", "`topk`, ratio 0.25", "`topk_weights`, ratio 0.5", "commit"], lines), caption(what, used, "speed.csv")
    )


def sampling_table() -> str:
    """The share of a sampled step that is the sampling itself."""
    stored = rows("share.csv")
    lines = [[r["work"], r["ratio"], f"{100 * float(r['sampling_share']):.1f}%"] for r in stored]
    what = "Share of a sampled step that goes into norms, selection, gathers and un-gathers."
    return block(table(["work", "ratio", "sampling"], lines), caption(what, stored, "share.csv"))


def library_table() -> str:
    """Models of libraries on a quarter of the rows."""
    stored = list(newest(rows("library_rows.csv"), "work").values())
    lines = [
        [
            f"`{r['work']}`",
            r["batch"],
            f"{float(r['inductor_ms']):.0f} ms",
            f"{float(r['rows_ms']):.0f} ms",
            times(r, "p"),
            f"{float(r['first_inductor_s']):.0f} s, {float(r['first_rows_s']):.0f} s",
            r["commit"],
        ]
        for r in stored
    ]
    what = 'Unmodified models of Hugging Face with `grad: {"axis": "rows", "ratio": 0.25}`: a training step without the optimizer.'
    head = ["model", "batch", "Inductor", "a quarter of the rows", "times Inductor's speed", "first step: Inductor, approx", "commit"]
    return block(table(head, lines), caption(what, stored, "library_rows.csv"))


def token_table() -> str:
    """Transformer blocks on a share of the tokens."""
    stored = list(newest(rows("token_rows.csv"), "work").values())
    lines = [
        [
            r["work"],
            f"{float(r['kept']):.2f}",
            f"{float(r['inductor_ms']):.0f} ms",
            f"{float(r['tokens_ms']):.0f} ms",
            times(r, "p"),
            r["commit"],
        ]
        for r in stored
    ]
    r = stored[0]
    what = f"A training step, without the optimizer, of {r['blocks']} transformer blocks of width {r['width']}, {r['tokens']} tokens, half of them padding."
    head = ["tokens kept in every region", "share", "Inductor", "on tokens", "times Inductor's speed (20th to 80th percentile of pairs)", "commit"]
    return block(table(head, lines), caption(what, stored, "token_rows.csv"))


def compile_table() -> str:
    """Seconds of the first step, with an empty and a filled cache."""
    lines, used = [], []
    for (work, setting), group in by(rows("compile.csv"), lambda r: (r["work"], r["ratio"])).items():
        last = {r["cache"]: r for r in newest_commit(group, "cache")}
        cells = [f"{float(r['inductor_s']):.1f} s, {float(r['approx_s']):.1f} s ({float(r['times']):.2f})" for r in (last["cold"], last["warm"])]
        name = f"default{mark(last['cold'])}" if setting == "adaptive" else f"forward, ratio {setting}"
        lines.append([work, name, last["cold"]["threads"], *cells, last["cold"]["commit"]])
        used += list(last.values())
    what = "Time of the first step with Inductor and with approx, and their ratio. With the default, all numbers of rows are included."
    what = explained(what, (r for r in used if r["ratio"] == "adaptive"))
    return block(table(["work", "settings", "threads", "empty cache", "filled cache", "commit"], lines), caption(what, used, "compile.csv"))


def deciding_table() -> str:
    """The share of the first step that goes into deciding and rewriting."""
    stored = rows("deciding.csv")
    lines = [[r["work"], f"{float(r['deciding_s']):.2f} s", f"{float(r['first_step_s']):.1f} s", f"{100 * float(r['share']):.1f}%"] for r in stored]
    what = "The part of a first step, with an empty cache, that goes into finding sites, deciding and rewriting."
    return block(table(["work", "deciding", "first step", "share"], lines), caption(what, stored, "deciding.csv"))


def _memory(stored: Sequence[Row], shown: Sequence[tuple[str, str]], what: str, name: str) -> str:
    lines = []
    for work, group in by(stored, lambda r: r["work"]).items():
        settings = {r["setting"]: r for r in group}
        lines.append([work, *(f"{float(settings[s]['peak_mb']):.0f} MB" for s, _ in shown)])
    return block(table(["work", *(title for _, title in shown)], lines), caption(what, stored, name))


def row_memory_table() -> str:
    """The most memory that a step holds with fewer rows."""
    stored = newest_commit(rows("row_memory.csv"), "work", "setting", least=15)
    shown = [("inductor", "Inductor"), ("adaptive, all rows", "all rows"), ("0.5", "half"), ("0.25", "a quarter"), ("0.1", "a tenth")]
    return _memory(stored, shown, "The most memory that a training step holds, over what the process holds between steps.", "row_memory.csv")


def zero_memory_table() -> str:
    """The same where weight gradients of convolutions are zero."""
    stored = rows("gradient_memory.csv")
    shown = [("inductor", "Inductor"), ("zero conv[1::2]", "`zero` in every other convolution"), ("zero conv", "`zero` in every convolution")]
    return _memory(stored, shown, "The most memory that a training step holds, over what the process holds between steps.", "gradient_memory.csv")


def tune_table() -> str:
    """Predicted against achieved speed-up of plans that `tune` finds."""
    stored = list(newest(rows("tune.csv"), "work").values())
    lines = [
        [
            r["work"],
            f"{float(r['error']):.2f}",
            f"`{r['kept']}`",
            f"{float(r['predicted']):.2f}",
            f"{float(r['achieved']):.2f}",
            f"{r['tune_s']} s",
            r["commit"],
        ]
        for r in stored
    ]
    what = "Plans that `tune` found: the gradient's error, the speed-up predicted and the one achieved, as times Inductor's, and the time of the search."
    return block(table(["work", "error", "sites and ratios", "predicted", "achieved", "search", "commit"], lines), caption(what, stored, "tune.csv"))


def plan_block() -> str:
    """The rules of a stored plan, without the record of how they were found."""
    rules = (RESULTS / "tune-blocks.toml").read_text().split("\n[tuned]")[0].rstrip()
    stored = [r for r in newest(rows("tune.csv"), "work").values() if r["work"].startswith("four transformer blocks")]
    what = f"Four transformer blocks, 8 x 128 tokens, `max_error` {stored[0]['max_error']}: {float(stored[0]['achieved']):.2f} times Inductor's speed."
    return block(f"```toml\n{rules}\n```", caption(what, stored, "tune-blocks.toml"))


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {
        "speed of rows": rows_table(),
        "speed of rows by allocator": allocator_table(),
        "speed of forward sampling": forward_table(),
        "share of sampling": sampling_table(),
        "library models": library_table(),
        "speed of tokens": token_table(),
        "compile times": compile_table(),
        "deciding": deciding_table(),
        "memory of rows": row_memory_table(),
        "memory of zero": zero_memory_table(),
        "tuned plans": tune_table(),
        "plan of blocks": plan_block(),
    }
