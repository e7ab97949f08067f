"""Describe to the user an op that cannot run on selected rows: why, where in the model it is, and what may be written instead."""

from __future__ import annotations

import re

from torch import fx

from approx_compile.rows.batch_dim import CROSS_SAMPLE

ADVICE = {
    CROSS_SAMPLE: "GroupNorm or LayerNorm keep samples apart; grad={'axis': 'rows', 'batch_norm': 'approximate'} tries BatchNorm",
    "is not linear in the gradient": "a torch op whose gradient is linear in it, or a function of the model's outputs outside of the compiled model",
    "is not known to keep samples apart": "ops of torch that work on each sample by itself, or the op outside of the compiled model",
    "samples are picked by index": "x.gather(1, i), or x[torch.arange(len(x)), i], for entries of every sample; a choice of samples before the model",
    "runs along the batch": "the batch as the first axis, if the axis was not meant to be the batch",
    "uses the batch's size as a number": "a mean over the batch outside of the compiled model",
    "one sample is taken out of the batch": "what depends on a single sample outside of the compiled model",
}
"""What may be written instead, by a part of the reason's text."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s+(.+)')


def describe_reason(n: fx.Node, reason: str) -> str:
    """Return a reason with the module and the source line that an op comes from, and with advice where there is some.

    Args:
        n: The node of the op.
        reason: Why it cannot run on selected rows.
    """
    place = ", ".join(p for p in (_module(n), _line(n)) if p)
    advice = next((text for what, text in ADVICE.items() if what in reason), "")
    return reason + (f" (at {place})" if place else "") + (f"; instead: {advice}" if advice else "")


def _module(n: fx.Node) -> str:
    """The name within the model of the innermost module that called the op."""
    stack = n.meta.get("fwd_nn_module_stack") or n.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    return re.sub(r"^[LG]\['\w+'\](\._modules)?\.?", "", path).replace("._modules", "").replace("['", ".").replace("']", "")


def _line(n: fx.Node) -> str:
    """The innermost source line outside torch that the op comes from, as file:number and code."""
    frames = [f for f in _FRAME.findall(n.meta.get("stack_trace") or "") if "/torch/" not in f[0]]
    if not frames:
        return ""
    path, line, code = frames[-1]
    return f"{path.rpartition('/')[2]}:{line}, {code.strip()}"
