"""Requests to Dynamo to trace a frame again with a symbol for the size of the batch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from approx_compile._torch.dynamo import dynamo_frame

try:
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis

    class RetraceFrame(UnspecializeRestartAnalysis, TensorifyScalarRestartAnalysis):  # type: ignore[misc]
        """Raised by a backend, makes Dynamo trace the frame once more. The second base makes it pass the backend call, the first is caught outside."""

except ImportError:  # then there is no symbol for the batch, and rows are not sampled
    RetraceFrame = None  # type: ignore[assignment,misc]


@dataclass
class SymbolRequest:
    """What was asked of one compilation: a symbol for dim 0 of the inputs that have these `names`, where tracing went all the way without one. `size`: how many
    tensors the graph had then; `why_not`: what is to be told of why it goes without one after all."""

    names: frozenset[str]
    size: int
    answered: bool = False
    why_not: Any = None


pending_requests: dict[Any, SymbolRequest] = {}
"""By compilation, until that ends."""


def compilation_key() -> tuple[str, Any] | None:
    """The compilation Dynamo is in, by its number and the code it compiles: the same when it traces again."""
    number, frame = torch._guards.CompileContext.current_compile_id(), dynamo_frame()
    if number is None or frame is None:
        return None
    return f"{number.frame_id}/{number.frame_compile_id}", getattr(frame.output.root_tx, "f_code", None)


def current_request() -> SymbolRequest | None:
    """What was asked of the compilation that Dynamo is in, which has now come to the backend."""
    found = pending_requests.get(key := compilation_key())
    if found is not None:
        _watch_end(dynamo_frame().output.root_tx, key)
    return found


def ask_for_symbol(placeholders: Sequence[fx.Node], size: int) -> None:
    """Have Dynamo trace again, with symbols for dim 0 of these inputs: this then does not return. (Where it can't be asked it does.)"""
    key, names = compilation_key(), frozenset(n for p in placeholders if (n := _source_name(p)) is not None)
    if RetraceFrame is None or key is None or not names or key in pending_requests or not _hook_automatic_dynamic():
        return
    pending_requests.clear()
    pending_requests[key] = SymbolRequest(names, size)
    raise RetraceFrame(restart_reason="approx: a symbol for the batch")


def retrace_without_symbol(asked: SymbolRequest, why_not: Any) -> None:
    """Have Dynamo trace again as it would by itself. `why_not` is in the request then. (Once: this returns if it has done so.)"""
    if asked.names:
        asked.names, asked.why_not = frozenset(), why_not
        raise RetraceFrame(restart_reason="approx: no symbol for the batch")


def _source_name(placeholder: fx.Node) -> str | None:
    return _name_of(getattr(placeholder.meta.get("grapharg"), "source", None))


def _name_of(source: Any) -> str | None:
    name = getattr(source, "name", None)
    return name() if callable(name) else name


@functools.cache
def _hook_automatic_dynamic() -> bool:
    """Have Dynamo look at the requests where it decides which sizes are symbols. (Marks on tensors would reach every other compilation that sees them.)"""
    try:
        from torch._dynamo.variables import builder
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        decide: Any = builder._automatic_dynamic
    except (ImportError, AttributeError):  # then there is no symbol for the batch
        return False

    @functools.wraps(decide)
    def decide_and_look(e: Any, tx: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        found = decide(e, tx, source, *args, **kwargs)
        asked = pending_requests.get(key := compilation_key()) if pending_requests else None
        if asked is not None:
            _watch_end(tx.output.root_tx, key)
            sizes = getattr(found, "dynamic_sizes", None)
            fixed = getattr(e, "_dynamo_static_indices", ())  # by the user
            if sizes and sizes[0] is DimDynamic.STATIC and 0 not in fixed and _name_of(source) in asked.names:
                sizes[0] = DimDynamic.DYNAMIC
        return found

    builder._automatic_dynamic = decide_and_look
    return True


def _watch_end(tx: Any, key: Any) -> None:
    """Dynamo's clean-up of a frame is told of: it comes before the backend's call, and when the frame is done or given up."""
    hooks = tx.output.cleanup_hooks
    if not any(isinstance(h, functools.partial) and h.func is _end_request for h in hooks):
        hooks.append(functools.partial(_end_request, tx, key))


def _end_request(tx: Any, key: Any) -> None:
    """What fails under a symbol that was asked for, before the backend is called, is traced without one; the request ends with the compilation."""
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


def symbol_failure_reason(error: Exception) -> str:
    """The reason, from an error of whoever traced or compiled."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"it can't be compiled with a symbol for the batch's size ({type(error).__name__}: {text[:200]})"
