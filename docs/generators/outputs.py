"""What functions of the package print, for pages to show: made by calling them, with the machine's profile that the tests use."""

from __future__ import annotations

import logging
import os
from unittest.mock import patch

import torch

import approx_compile
from approx_compile.backend import run_as_is
from generators.stored import ROOT

ENVIRONMENT = {"APPROX_COMPILE_MACHINE": str(ROOT / "tests" / "helpers" / "machine.json"), "COLUMNS": "96"}


def explain_output() -> str:
    """The report of the model in the README's loop, before training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    with patch.dict(os.environ, ENVIRONMENT):
        return as_block(approx_compile.explain(model, torch.randn(256, 784)))


def first_notice() -> str:
    """The line that the backend prints at the first call of the tutorial's model."""
    log, lines = logging.getLogger("approx_compile"), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    torch.compiler.reset()  # other models of the process count towards a limit of recompilations
    hidden = torch.nn.Linear(1024, 1024)
    model = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.ReLU(), hidden, torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    with patch.dict(os.environ, ENVIRONMENT), patch.object(log, "propagate", False), patch.object(log, "handlers", [handler]):
        torch.compile(model, backend=approx_compile.Backend(inner_compile=run_as_is))(torch.randn(256, 64)).sum().backward()
    (line,) = lines
    return as_block(line)


def as_block(text: object) -> str:
    """Text as a block of a page. The environment must have the width of the lines."""
    lines = [line.rstrip() for line in str(text).strip("\n").splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```"


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"output of explain": explain_output(), "first notice": first_notice()}
