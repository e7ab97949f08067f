"""How precisely torch may multiply float32: settings of the whole process that decide times, so a measurement belongs to them.

torch has two generations of them. The older ones (`torch.set_float32_matmul_precision`, `allow_tf32`) set newer ones as well, and refuse to be read once the
newer ones (`fp32_precision`) were set to something that they cannot say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

_NOTHING_SET = {"cuda": {"matmul": "ieee", "conv": "tf32"}, "cpu": {"matmul": "ieee", "conv": "ieee"}}


def settings() -> dict[str, Any]:
    """What `take_over` takes, in JSON's types: {"older": {name: value}, device: {"matmul" | "conv": "none" | "ieee" | "tf32" | "bf16"}}."""
    older: dict[str, Any] = {}
    with contextlib.suppress(RuntimeError):
        older["matmul"] = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        older["cudnn"] = torch.backends.cudnn.allow_tf32
    return {"older": older} | {device: {kind: place.fp32_precision for kind, place in places.items()} for device, places in _places().items()}


def take_over(found: Mapping[str, Any]) -> None:
    """Set in this process what `settings` found in another one. The older ones come first, as they set the newer ones."""
    if "matmul" in found["older"]:
        torch.set_float32_matmul_precision(found["older"]["matmul"])
    if "cudnn" in found["older"]:
        torch.backends.cudnn.allow_tf32 = found["older"]["cudnn"]
    for device, places in _places().items():
        for kind, place in places.items():
            place.fp32_precision = found[device][kind]


def label(device: str) -> str:
    """Part of the name of a file with times of this device ("cpu" or "cuda"), such as "-matmul-tf32": empty as long as nobody has set anything."""
    kinds = {kind: found if found != "none" else "ieee" for kind, found in settings()[device].items()}
    return "".join(f"-{kind}-{found}" for kind, found in kinds.items() if found != _NOTHING_SET[device][kind])


def _places() -> dict[str, dict[str, Any]]:
    backends: Any = torch.backends
    return {
        "cuda": {"matmul": backends.cuda.matmul, "conv": backends.cudnn.conv},
        "cpu": {"matmul": backends.mkldnn.matmul, "conv": backends.mkldnn.conv},
    }
