"""Requests to Dynamo to trace a frame again with a symbol for the size of the batch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from approx_compile._torch.dynamo import dynamo_frame
from approx_compile.reasons import Reason
from approx_compile.reasons.rows import SYMBOL_FAILS

try:
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

    class RetraceFrame(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):  # type: ignore[misc]
        """Makes Dynamo trace the frame once more if a backend raises it.

        The second base class passes through the call of the backend; Dynamo catches the first.
        """

except ImportError:  # then no symbol can be asked for, and rows are not sampled
    RetraceFrame = None  # type: ignore[assignment,misc]


@dataclass
class SymbolRequest:
    """What was asked of one compilation.

    Attributes:
        dims: The dim that is to have a symbol by the source of the input; empty once the frame is to be traced without one.
        size: How many tensors the graph had when it was traced without the symbol.
        answered: Whether the backend has been called for the frame traced with the symbol.
        why_not: Why the frame is traced without a symbol after all, for reports: a reason, or a list with one for each graph that it is compiled as.
    """

    dims: Mapping[str, int]
    size: int
    answered: bool = False
    why_not: Any = None


pending_requests: dict[Any, SymbolRequest] = {}
"""The requests by compilation, until that ends."""


def compilation_key() -> tuple[str, Any] | None:
    """Identify the compilation that Dynamo is in. The key stays the same when Dynamo traces the frame again.

    Returns:
        Dynamo's number and the code object; None outside of a compilation.
    """
    number, frame = torch._guards.CompileContext.current_compile_id(), dynamo_frame()
    if number is None or frame is None:
        return None
    return f"{number.frame_id}/{number.frame_compile_id}", getattr(frame.output.root_tx, "f_code", None)


def current_request() -> SymbolRequest | None:
    """Return the request of the compilation that Dynamo is in; the backend calls it when the frame has come back to it. None without one."""
    asked = pending_requests.get(key := compilation_key())
    if asked is not None:
        _watch_end(dynamo_frame().output.root_tx, key)
    return asked


def ask_for_symbol(placeholders: Mapping[fx.Node, int], size: int) -> None:
    """Have Dynamo trace the frame again with symbols for the batch's size in some inputs.

    Does not return then. It returns where Dynamo can't be asked, or has been asked already.

    Args:
        placeholders: The dim that is to have a symbol by the input of Dynamo's graph.
        size: How many tensors the graph has.

    Raises:
        RetraceFrame: Dynamo catches it and traces the frame again.
    """
    key, dims = compilation_key(), {name: d for p, d in placeholders.items() if (name := _source_name(p)) is not None}
    if RetraceFrame is None or key is None or not dims or key in pending_requests or not _hook_automatic_dynamic():
        return
    pending_requests.clear()
    pending_requests[key] = SymbolRequest(dims, size)
    raise RetraceFrame(restart_reason="approx: a symbol for the batch")


def retrace_without_symbol(asked: SymbolRequest, why_not: Any) -> None:
    """Have Dynamo trace the frame again as it would without a request. Returns if that has been done already.

    Args:
        asked: The request.
        why_not: The reason, which the request keeps for reports.

    Raises:
        RetraceFrame: Dynamo catches it and traces the frame again.
    """
    if asked.dims:
        asked.dims, asked.why_not = {}, why_not
        raise RetraceFrame(restart_reason="approx: no symbol for the batch")


def _source_name(placeholder: fx.Node) -> str | None:
    """The name of Dynamo's source of a placeholder."""
    return _name_of(getattr(placeholder.meta.get("grapharg"), "source", None))


def _name_of(source: Any) -> str | None:
    name = getattr(source, "name", None)
    return name() if callable(name) else name


@functools.cache
def _hook_automatic_dynamic() -> bool:
    """Patch Dynamo's choice of which sizes are symbolic, so that it looks at the requests. False if this torch has no such function.

    Marks on the tensors themselves would reach every other compilation that sees the tensors.
    """
    try:
        from torch._dynamo.variables import builder
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        decide: Any = builder._automatic_dynamic
    except (ImportError, AttributeError):  # then no symbol can be asked for
        return False

    @functools.wraps(decide)
    def decide_and_look(e: Any, tx: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        decision = decide(e, tx, source, *args, **kwargs)
        asked = pending_requests.get(key := compilation_key()) if pending_requests else None
        if asked is not None:
            _watch_end(tx.output.root_tx, key)
            sizes = getattr(decision, "dynamic_sizes", None)
            fixed = getattr(e, "_dynamo_static_indices", ())  # marked static by the user
            dim = asked.dims.get(_name_of(source) or "")
            if sizes and dim is not None and dim < len(sizes) and sizes[dim] is DimDynamic.STATIC and dim not in fixed:
                sizes[dim] = DimDynamic.DYNAMIC
        return decision

    builder._automatic_dynamic = decide_and_look
    return True


def _watch_end(tx: Any, key: Any) -> None:
    """Have Dynamo call `_end_request` when it cleans up a frame: before the backend is called, and when the frame is compiled or given up."""
    hooks = tx.output.cleanup_hooks
    if not any(isinstance(h, functools.partial) and h.func is _end_request for h in hooks):
        hooks.append(functools.partial(_end_request, tx, key))


def _end_request(tx: Any, key: Any) -> None:
    """End a request together with its compilation. A frame that fails under the requested symbol before the backend is called is traced without one."""
    from torch._dynamo.exc import RestartAnalysis

    error, asked = sys.exc_info()[1], pending_requests.get(key)
    if asked is None or (error is None and not asked.answered):
        return
    if isinstance(error, RestartAnalysis):
        asked.answered = False
        return
    if isinstance(error, Exception) and not asked.answered:
        tx.speculation_log.clear()
        retrace_without_symbol(asked, symbol_failure_reason(error))
    del pending_requests[key]


def symbol_failure_reason(error: Exception) -> Reason:
    """Return the reason for reports from an error in tracing or compiling with a symbol.

    Args:
        error: The error.

    Returns:
        The reason, with the first line of the error's text.
    """
    text = next(iter(str(error).strip().splitlines()), "")
    return SYMBOL_FAILS(error=f"{type(error).__name__}: {text[:200]}")
