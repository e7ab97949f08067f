"""Find the module and the line of the user's code that an op of a graph comes from."""

from __future__ import annotations

import re
import textwrap

from torch import fx

LONGEST_LINE = 80
"""Characters of a source line that are shown."""

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in \S+\n\s+(.+)')


def source_place(n: fx.Node) -> str:
    """Return the module and the source line that an op comes from, as "blocks.0.attn, model.py:12, x = x.softmax(0)"; what is not known is left out.

    Args:
        n: A node of Dynamo's graph, of a joint graph or of a backward graph.
    """
    return ", ".join(p for p in (_module(n), _line(n)) if p)


def _module(n: fx.Node) -> str:
    """The name within the model of the innermost module that called the op. The model may be an argument of a decorator's `*args`."""
    stack = n.meta.get("fwd_nn_module_stack") or n.meta.get("nn_module_stack") or {}
    path = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    return re.sub(r"^[LG]\['\w+'\](\[\d+\])?(\._modules)?\.?", "", path).replace("._modules", "").replace("['", ".").replace("']", "")


def _line(n: fx.Node) -> str:
    """The innermost source line outside torch that the op comes from, as file:number and code."""
    frames = [f for f in _FRAME.findall(n.meta.get("stack_trace") or "") if "/torch/" not in f[0]]
    if not frames:
        return ""
    path, line, code = frames[-1]
    return f"{path.rpartition('/')[2]}:{line}, {textwrap.shorten(code, LONGEST_LINE, placeholder=' ...')}"
