"""Imported for its effects: frameworks ask no hub in tests, and a torchvision that was built for another torch does no harm."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["KERAS_BACKEND"] = "torch"

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # its operators are missing; no model here needs one
    _OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
