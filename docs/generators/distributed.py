"""Tables of data-parallel training: bytes that the ranks exchange, steps over limited links, steps of many workers, shares of their rows that ranks keep.

A table whose rows are not stored yet says with which command to measure them.
"""

from __future__ import annotations

from generators.stored import RESULTS, Row, block, caption, newest, rows, table

MODELS = {
    "mlp": ("MLP 1024-2048-2048-10, all layers", ""),
    "blocks": ("four transformer blocks, width 256, all layers", ""),
    "resnet-152, 256 channels": ("ResNet-152, layers that read 256 channels or more", "52% (40% of the compute)"),
    "resnet-152, 512 channels": ("ResNet-152, layers that read 512 channels or more", "77% (12%)"),
    "resnet-152, 1024 channels": ("ResNet-152, layers that read 1024 channels or more", "87% (9%)"),
}
"""By the stored name: what is sampled, and what is left of the communication in table 1 of Adelman et al., with the compute left out."""


def _stored(name: str, *keys: str) -> list[Row]:
    """The newest row of every combination of `keys`; none if the file does not exist."""
    return list(newest(rows(name), *keys).values()) if (RESULTS / name).exists() else []


def _not_run(command: str) -> str:
    return f"*Not run yet: `python -m benchmarks.distributed.{command}`.*"


def bytes_table() -> str:
    """The share of the gradients' bytes that are sent, with the model as one graph and cut at DDP's buckets."""
    stored = _stored("exchange_bytes.csv", "model", "graphs")
    lines = []
    for model, (name, paper) in MODELS.items():
        found = {r["graphs"]: r for r in stored if r["model"] == model}
        shares = [f"{float(found[g]['share']):.1%}" if g in found else "not run" for g in ("one", "buckets")]
        some = next(iter(found.values()), None)
        lines.append([name, f"{float(some['whole_mb']):.1f}" if some else "", *shares, paper, some["commit"] if some else ""])
    what = "What a rank passes to the all-reduce in a step, counted by the hook, as a share of all gradients; `topk_weights`, ratio 0.5."
    head = ["sampled", "all gradients, MB", "sent, one graph", "sent, DDP's buckets", "sent, Adelman et al.", "commit"]
    return block(table(head, lines), caption(what, stored, "exchange_bytes.csv"))


def _sent(row: Row) -> str:
    return "not counted" if row["mb"] == "nan" else f"{float(row['mb']):.1f}"


def links_table() -> str:
    """Steps over limited links, by the way of exchange."""
    stored = _stored("exchange_links.csv", "model", "ranks", "mbit_s", "way")
    if not stored:
        return _not_run("exchange links")
    lines = [[r["model"], r["ranks"], f"{float(r['mbit_s']):g}", r["way"], f"{float(r['step_ms']):.0f}", _sent(r), r["of_full"], r["commit"]] for r in stored]
    what = "Forward pass, backward pass and exchange of gradients, without the optimizer; ranks in network namespaces of one machine, links limited by `tc`."
    head = ["model", "ranks", "link, Mbit/s", "exchange", "step, ms", "sent, MB", "step, of full", "commit"]
    return block(table(head, lines), caption(what, stored, "exchange_links.csv"))


def scaling_table() -> str:
    """Predicted steps of many workers."""
    stored = _stored("scaling.csv", "model", "workers", "alpha_us", "gbit_s", "buckets")
    if not stored:
        return _not_run("scaling predict")
    lines = [
        [r["model"], f"{float(r['gbit_s']):g}", r["workers"], f"{float(r['exact_ms']):.0f}", f"{float(r['sampled_ms']):.0f}", f"{float(r['speedup']):.2f}"]
        for r in stored
    ]
    what = f"Predicted by an alpha-beta model of a ring all-reduce that overlaps with the backward pass, {stored[0]['alpha_us']} us of latency; not measured."
    head = ["model", "link, Gbit/s", "workers", "exact step, ms", "sampled step, ms", "speed-up"]
    return block(table(head, lines), caption(what, stored, "scaling.csv"))


def shares_table() -> str:
    """The shares of the rows that two ranks keep with and without agreement, and the steps that follow."""
    stored = _stored("distributed_shares.csv", "dataset", "noise", "ranks", "agree")
    if not stored:
        return _not_run("shares run --data DIR")
    lines = [
        [
            f"{float(r['noise']):.0%}" if float(r["noise"]) else "none",
            "yes" if r["agree"] == "True" else "no",
            " and ".join(r["shares"].split()),
            f"{float(r['mean_step']):.3f}",
            f"{float(r['slowest_step']):.3f}",
            r["commit"],
        ]
        for r in stored
    ]
    what = (
        f"{stored[0]['ranks']} ranks train an MLP 784-512-512-10 on {stored[0]['samples']} images of {stored[0]['dataset']} each, {stored[0]['epochs']} "
        "epochs, batches of 128. Rows kept are means over the steps. Steps are shares of an exact step, by the stored times of an MLP on a share of its rows "
        "(`rows.csv`): the mean over the ranks, and the slowest rank, for which the others wait."
    )
    head = ["random labels of one rank", "agreement", "rows kept by each rank", "step, mean", "step, slowest", "commit"]
    return block(table(head, lines), caption(what, stored, "distributed_shares.csv"))


def blocks() -> dict[str, str]:
    """The generated blocks."""
    return {
        "bytes exchanged": bytes_table(),
        "steps over limited links": links_table(),
        "steps of many workers": scaling_table(),
        "shares of ranks": shares_table(),
    }
