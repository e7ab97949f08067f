"""What functions of the package print, for pages to show: made by calling them, with the machine's profile that the tests use."""

from __future__ import annotations

import os
from unittest.mock import patch

import torch

import approx_compile
from generators.stored import ROOT

ENVIRONMENT = {"APPROX_COMPILE_MACHINE": str(ROOT / "tests" / "helpers" / "machine.json"), "COLUMNS": "96"}


def explain_output() -> str:
    """The report of the model in the README's loop, before training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(784, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
    with patch.dict(os.environ, ENVIRONMENT):
        return as_block(approx_compile.explain(model, torch.randn(256, 784)))


def as_block(text: object) -> str:
    """Text as a block of a page. The environment must have the width of the lines."""
    lines = [line.rstrip() for line in str(text).strip("\n").splitlines()]
    return "```text\n" + "\n".join(lines) + "\n```"


def blocks() -> dict[str, str]:
    """The blocks that this module makes, by name."""
    return {"output of explain": explain_output()}
