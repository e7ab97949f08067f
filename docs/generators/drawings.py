"""Drawings of the methods as SVG text. They hold no measured figure; where bars have heights, these are made up to show the idea."""

from __future__ import annotations

from collections.abc import Sequence

GREY, DARK, GREEN, ORANGE, LIGHT = "#d8dee9", "#2e3440", "#1b7f4d", "#c2571a", "#f4f5f7"
NORMS = (0.9, 0.15, 0.5, 0.1, 0.75, 0.2, 0.12, 0.35)
KEPT = (0, 2, 4, 7)


def rect(x: float, y: float, width: float, height: float, fill: str = GREY, stroke: str = DARK) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, anchor: str = "middle", fill: str = DARK, size: int = 13) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{words}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float, color: str = DARK) -> str:
    return f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" stroke="{color}" stroke-width="1.6" fill="none" marker-end="url(#head)"/>'


def picture(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A whole SVG file. `title` is what a screen reader says."""
    tip = f'<path d="M0 0 L8 4 L0 8 z" fill="{DARK}"/>'
    head = f'<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">{tip}</marker>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-family="sans-serif">',
            f"<title>{title}</title>",
            f"<defs>{head}</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def column(x: float, y: float, kept: Sequence[int], size: float = 22, width: float = 90, fill: str = GREEN, count: int = 8) -> list[str]:
    """A tensor drawn as rows, with some of them filled."""
    return [rect(x, y + i * size, width, size - 3, fill if i in kept else LIGHT) for i in range(count)]


def rows() -> str:
    """The whole batch forward, norms of the gradient at the outputs, the kept samples backward."""
    every, top = range(8), 60
    bars = [rect(470, top + 22 * i, 90 * n, 19, GREEN if i in KEPT else GREY) for i, n in enumerate(NORMS)]
    small = column(640, top + 44, range(4), fill=GREEN, count=4) + column(780, top + 44, range(4), fill=GREEN, count=4)
    parts = [
        *[text(145, 40, "forward pass: all samples"), text(515, 40, "size of each sample's gradient"), text(755, 40, "backward pass: kept samples")],
        *column(40, top, every, fill=GREY),
        *column(180, top, every, fill=GREY),
        *[arrow(132, top + 86, 176, top + 86), arrow(272, top + 86, 316, top + 86)],
        *[rect(320, top + 60, 80, 52, "white"), text(360, top + 91, "loss"), arrow(402, top + 86, 462, top + 86)],
        *bars,
        *[arrow(590, top + 86, 634, top + 86), arrow(732, top + 86, 776, top + 86)],
        *small,
        *[text(515, 256, "likely kept: large ones (green)", fill=GREEN), text(755, 256, "each is divided by its probability,", fill=GREEN)],
        *[text(755, 273, "so the gradient stays unbiased", fill=GREEN), text(145, 256, "exact, and so is the loss")],
    ]
    return picture(900, 292, "Rows: exact forward pass on the whole batch; the backward pass runs on samples chosen by the size of their gradient", parts)


def tokens() -> str:
    """The gradients that enter a region, one square for each token; the tokens kept, on which the region runs; the result among all tokens."""
    kept, padding = {(0, 1), (0, 4), (1, 0), (2, 2), (2, 3), (2, 5)}, {(1, 4), (1, 5), (3, 2), (3, 3), (3, 4), (3, 5)}
    top, size = 70, 24

    def grid(x: float, other: str) -> list[str]:
        fills = {(r, c): GREEN if (r, c) in kept else "white" if (r, c) in padding else other for r in range(4) for c in range(6)}
        return [rect(x + c * size, top + r * size, size - 3, size - 3, fill) for (r, c), fill in fills.items()]

    parts = [
        *[text(112, 40, "gradient that enters"), text(112, 57, "samples x positions", size=11)],
        *grid(40, GREY),
        *[arrow(192, top + 46, 236, top + 46), text(310, 40, "the tokens kept")],
        *[rect(244 + i * size, top + 36, size - 3, size - 3, GREEN) for i in range(len(kept))],
        *[arrow(394, top + 46, 438, top + 46), rect(442, top + 10, 150, 74, "white")],
        *[text(517, top + 36, "the region's ops:"), text(517, top + 54, "products, norms, .."), text(517, top + 72, "on the tokens kept")],
        *[arrow(596, top + 46, 640, top + 46), text(720, 40, "its result among all tokens")],
        *grid(648, LIGHT),
        *[text(112, 190, "white: padding, gradient 0", size=12), text(316, 190, "divided by their probability", size=12, fill=GREEN)],
        text(720, 190, "zero elsewhere, then added to what bypasses", size=12),
    ]
    return picture(890, 214, "Tokens: a region of the backward pass runs on tokens chosen by the size of their gradient", parts)


def _product(kept: Sequence[int], by_weight: bool = False) -> list[str]:
    """A product Y = A B whose contraction axis has eight entries."""
    size, top, left = 20, 70, 60
    a = [rect(left + i * size, top, size - 3, 110, GREEN if i in kept else LIGHT) for i in range(8)]
    b = [rect(left + 230, top - 20 + i * size, 110, size - 3, GREEN if i in kept else LIGHT) for i in range(8)]
    scores = [rect(left + i * size, 250 - 40 * n, size - 3, 40 * n, GREEN if i in kept else GREY) for i, n in enumerate(NORMS)]
    name = "norm of B's row" if by_weight else "norm of A's column times norm of B's row"
    return [
        *a,
        *[text(left + 80, top - 10, "A (activation)"), text(left + 195, top + 62, "·", size=30), text(left + 285, top - 28, "B (weight)")],
        *b,
        *scores,
        *[text(left + 80, 270, name, size=12), text(left + 370, top + 62, "≈", size=20)],
        *[rect(left + 400, top, 110, 110, GREY), text(left + 455, top - 10, "Y")],
        text(left + 455, 270, "product of the green parts only", size=12, fill=GREEN),
    ]


def topk() -> str:
    return picture(640, 290, "Top-k: the entries of the contraction axis with the largest product of norms are kept", _product(KEPT))


def topk_weights() -> str:
    """The layer before computes the kept channels only."""
    top, layers = 60, []
    for x, kept, name in ((60, range(8), "input"), (250, KEPT, "hidden activation"), (440, range(8), "output")):
        layers += [*column(x, top, kept, width=90, fill=GREEN if kept is KEPT else GREY), text(x + 45, top - 14, name)]
    parts = [
        *layers,
        *[arrow(154, top + 86, 244, top + 86), text(199, top + 70, "layer 1", size=12), text(199, top + 112, "computes green", size=12, fill=GREEN)],
        *[arrow(344, top + 86, 434, top + 86), text(389, top + 70, "layer 2", size=12), text(389, top + 112, "reads green", size=12, fill=GREEN)],
        text(295, 262, "the weight of layer 2 decides, before there is an activation", size=12),
    ]
    return picture(600, 280, "topk_weights: the weights decide which channels are kept, so the layer before computes only those", parts)


def random_selection() -> str:
    """Probabilities and scales."""
    parts, base = [], 170
    for i, n in enumerate(NORMS):
        x, kept = 60 + 62 * i, i in KEPT
        parts += [rect(x, base - 110 * n, 40, 110 * n, GREEN if kept else GREY), text(x + 20, base + 18, f"p{i + 1}", size=12)]
        parts += [text(x + 20, base + 40, f"1/p{i + 1}" if kept else "0", size=12, fill=GREEN if kept else ORANGE)]
    parts += [
        text(30, base + 18, "p", size=12),
        text(30, base + 40, "scale", size=12),
        text(300, 30, "each entry is drawn with a probability, and a drawn one is scaled up"),
    ]
    return picture(580, 230, "Random selection: entries are drawn with a probability in proportion to their norms and divided by it", parts)


def _map(x: float, y: float, title: str, marked: dict[tuple[int, int], str], tile: int = 0) -> list[str]:
    size = 18
    cells = [rect(x + size * c, y + size * r, size, size, GREEN if (r, c) in marked else LIGHT, "#b8c0cc") for r in range(8) for c in range(8)]
    words = [text(x + size * c + size / 2, y + size * r + 13, s, size=10, fill="white") for (r, c), s in marked.items()]
    lines = (
        [f'<path d="M{x + size * t} {y} v{size * 8} M{x} {y + size * t} h{size * 8}" stroke="{DARK}" stroke-width="2"/>' for t in range(tile, 8, tile)]
        if tile
        else []
    )
    return [*cells, *words, *lines, rect(x, y, size * 8, size * 8, "none"), text(x + size * 4, y - 12, title, size=12)]


def max_gradient() -> str:
    """One entry for an image, and one for each tile."""
    parts = [
        *_map(40, 60, "max: one entry has the whole sum", {(2, 5): "Σ"}),
        *_map(260, 60, "max, tile 4: one for each tile", {(2, 5): "Σ", (1, 1): "Σ", (5, 2): "Σ", (6, 6): "Σ"}, 4),
        *[
            arrow(424, 132, 470, 132),
            text(560, 118, "weight gradient:", size=12),
            text(560, 138, "sum of patches of the input", size=12),
            text(560, 158, "at the green places", size=12),
        ],
        text(222, 232, "output gradient of one sample and one channel of a convolution", size=12),
    ]
    return picture(660, 252, "max: of the output gradient of a channel only the largest entry counts, with the sum of the channel or of its tile", parts)


def schedule() -> str:
    """Layers over steps: which weight gradients are replaced under schedules 1, 2 and 3."""
    rules = (
        ("schedule 1", lambda layer, step: layer % 4 == 1),
        ("schedule 2", lambda layer, step: layer % 2 == 1 and step % 2 == 1),
        ("schedule 3", lambda layer, step: step % 4 == 3),
    )
    parts: list[str] = []
    for n, (name, replaced) in enumerate(rules):
        left = 70 + 210 * n
        parts += [text(left + 80, 34, name)]
        parts += [rect(left + 20 * s, 50 + 20 * layer, 18, 18, ORANGE if replaced(layer, s) else GREY) for s in range(8) for layer in range(8)]
    parts += [text(14, 136, "layers", "start", size=12), text(356, 236, "steps; orange: the weight gradient is replaced (a quarter of all)", size=12)]
    return picture(700, 252, "Schedules: which weight gradients are replaced at which step", parts)


def shared_choice() -> str:
    """Query, key and value read the same kept entries."""
    parts = [
        *[rect(40 + 20 * i, 70, 17, 110, GREEN if i in KEPT else LIGHT) for i in range(8)],
        text(120, 56, "activation"),
        text(120, 204, "one choice", fill=GREEN),
    ]
    parts += [rect(290, 90, 80, 70, GREEN), text(330, 80, "gathered once", size=12)]
    parts += [arrow(204, 125, 284, 125)]
    for i, name in enumerate(("query", "key", "value")):
        parts += [rect(470, 40 + 66 * i, 110, 46, GREY), text(525, 68 + 66 * i, name), arrow(372, 125, 464, 63 + 66 * i)]
    return picture(620, 250, "Shared choice: layers that read one activation are sampled at the same entries of it", parts)


def site() -> str:
    """A site with its three products."""
    boxes = ((40, "output", "Y = X W", "forward"), (250, "grad_input", "dX = dY Wᵀ", "backward"), (460, "grad_weight", "dW = Xᵀ dY", "backward"))
    parts: list[str] = []
    for x, name, formula, when in boxes:
        parts += [rect(x, 60, 170, 90, LIGHT), text(x + 85, 88, name), text(x + 85, 112, formula), text(x + 85, 136, when, size=12)]
    parts += [
        text(335, 36, "one site: a layer's product and its two gradient products"),
        text(335, 180, "each of the three may be exact, sampled or replaced", size=12),
    ]
    return picture(670, 200, "A site is a matrix product or convolution with its two gradient products", parts)


def zeros() -> str:
    """Zeros of a gradient, followed to the layer before."""
    top = 60
    parts = [
        *[text(105, 44, "gradient of layer 1's output"), text(515, 44, "layer 1's weight gradient")],
        *column(60, top, KEPT, width=90),
        *column(470, top, KEPT, width=90),
        arrow(160, top + 86, 460, top + 86),
        *[text(310, top + 76, "products over the green", size=12), text(310, top + 106, "channels only", size=12)],
        text(310, 260, "white: exactly zero, because layer 2 dropped these channels; no value changes", size=12),
    ]
    return picture(620, 280, "Zeros in a gradient are followed to the layer before, whose gradient products leave those channels out", parts)


DRAWINGS = {
    "rows.svg": rows,
    "tokens.svg": tokens,
    "topk.svg": topk,
    "topk-weights.svg": topk_weights,
    "random.svg": random_selection,
    "max.svg": max_gradient,
    "schedules.svg": schedule,
    "share.svg": shared_choice,
    "site.svg": site,
    "zeros.svg": zeros,
}
"""By the name of a file in docs/images, the function that returns its text."""
