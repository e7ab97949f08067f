"""Read, copy and name the settings that say how precisely torch may multiply float32.

They hold for the whole process and decide how long products take, so every measurement belongs to one set of them.

torch has two generations of these settings. The older ones (`torch.set_float32_matmul_precision`, `allow_tf32`) set the newer ones (`fp32_precision`) as
well. They raise when they are read after the newer ones were set to a value that they cannot express.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

_DEFAULTS = {"cuda": {"matmul": "ieee", "conv": "tf32"}, "cpu": {"matmul": "ieee", "conv": "ieee"}}


def settings() -> dict[str, Any]:
    """Read the settings of this process.

    Returns:
        The settings in JSON's types: {"older": {name: value}, device: {"matmul" | "conv": "none" | "ieee" | "tf32" | "bf16"}}.
    """
    older: dict[str, Any] = {}
    with contextlib.suppress(RuntimeError):
        older["matmul"] = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        older["cudnn"] = torch.backends.cudnn.allow_tf32
    return {"older": older} | {device: {kind: place.fp32_precision for kind, place in places.items()} for device, places in _places().items()}


def take_over(values: Mapping[str, Any]) -> None:
    """Set in this process the settings of another one. The older settings are set first, because they set the newer ones as well.

    Args:
        values: What `settings` returned in the other process.
    """
    if "matmul" in values["older"]:
        torch.set_float32_matmul_precision(values["older"]["matmul"])
    if "cudnn" in values["older"]:
        torch.backends.cudnn.allow_tf32 = values["older"]["cudnn"]
    for device, places in _places().items():
        for kind, place in places.items():
            place.fp32_precision = values[device][kind]


def label(device: str) -> str:
    """Return the part of a file's name that says which settings its times belong to.

    Args:
        device: "cpu" or "cuda".

    Returns:
        The settings that differ from torch's defaults, such as "-matmul-tf32"; empty if none does.
    """
    kinds = {kind: value if value != "none" else "ieee" for kind, value in settings()[device].items()}
    return "".join(f"-{kind}-{value}" for kind, value in kinds.items() if value != _DEFAULTS[device][kind])


def _places() -> dict[str, dict[str, Any]]:
    backends: Any = torch.backends
    return {
        "cuda": {"matmul": backends.cuda.matmul, "conv": backends.cudnn.conv},
        "cpu": {"matmul": backends.mkldnn.matmul, "conv": backends.mkldnn.conv},
    }
