"""Run by `accuracy` in a process of its own: `python -m approx_compile.tools.accuracy_child SPEC SEED RESULT THREADS` trains once and writes the result."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from approx_compile.tools.model_loader import load_function

EXPECTED = "a number is expected, or a dict such as {'accuracy': 0.98, 'seconds': 12.5}"


def result_of(returned: Any, seconds: float) -> dict[str, Any]:
    """Read what the training function returned.

    Args:
        returned: A number, or a mapping with `accuracy` and perhaps `seconds`.
        seconds: The seconds that the call took.

    Returns:
        `value` and `seconds`, or `error`.
    """
    table: Mapping[str, Any] = returned if isinstance(returned, Mapping) else {"accuracy": returned}
    try:
        value, took = float(table["accuracy"]), float(table.get("seconds", seconds))
    except (KeyError, TypeError, ValueError):
        return {"error": f"returned {returned!r}; {EXPECTED}"}
    if not math.isfinite(value) or not took > 0:
        return {"error": f"returned accuracy {value} and seconds {took}; finite numbers are expected"}
    return {"value": value, "seconds": took}


def main(spec: str, seed: str, result: str, threads: str) -> None:
    """Train once and write `result` as JSON."""
    if int(threads):
        torch.set_num_threads(int(threads))
    run = load_function(spec)
    begin = time.perf_counter()
    returned = run(int(seed))
    Path(result).write_text(json.dumps(result_of(returned, time.perf_counter() - begin)))


if __name__ == "__main__":
    main(*sys.argv[1:])
