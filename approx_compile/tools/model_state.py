"""Snapshot a model's state before trial steps, and restore it afterwards, so that `explain` and `tune` leave the user's model as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from approx_compile.backend.capture.annotate import annotation_of


@dataclass(frozen=True)
class ModelState:
    """The attributes and buffers of a model's modules at one moment."""

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    """The `__dict__` of each module, without the attributes that this package writes."""
    buffers: list[dict[str, Tensor | None]]
    """The registered buffers of each module."""
    contents: list[tuple[Tensor, Tensor]]
    """Every buffer and a copy of its content."""

    @staticmethod
    def snapshot(model: Any) -> ModelState:
        """Record a model's attributes and buffers.

        Args:
            model: The model. For a function nothing is recorded.

        Returns:
            The state. Attributes are recorded by reference, buffers' contents as copies.
        """
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        attributes = [{k: v for k, v in m.__dict__.items() if not annotation_of(k)} for m in modules]
        buffers = [dict(m._buffers) for m in modules]
        contents = [(b, b.detach().clone()) for registered in buffers for b in registered.values() if b is not None]
        return ModelState(modules, attributes, buffers, contents)

    def restore(self) -> None:
        """Restore attributes and buffers as they were, and delete attributes that are new."""
        for m, attributes, buffers in zip(self.modules, self.attributes, self.buffers, strict=True):
            for key in [k for k in m.__dict__ if k not in attributes and not annotation_of(k)]:
                del m.__dict__[key]
            m.__dict__.update(attributes)
            m._buffers.clear()
            m._buffers.update(buffers)
        with torch.no_grad():
            for b, content in self.contents:
                b.copy_(content)


@contextlib.contextmanager
def model_state_preserved(model: Any) -> Iterator[None]:
    """Restore modules' attributes, buffers and torch's random state when the block ends, whether or not it fails.

    Args:
        model: The model, or a function, of which only the random state is restored.

    Yields:
        Nothing.
    """
    state = ModelState.snapshot(model)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            state.restore()


@contextlib.contextmanager
def training_state_preserved(model: nn.Module) -> Iterator[None]:
    """Restore also parameters, their `.grad`, and the random states of numpy and Python when the block ends, whether or not it fails.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    parameters = [(p, p.detach().clone(), p.grad, p._version) for p in model.parameters()]
    python_random, numpy_random = random.getstate(), np.random.get_state()
    with model_state_preserved(model):
        try:
            yield
        finally:
            with torch.no_grad():
                for p, content, grad, version in parameters:
                    if p._version != version:
                        p.copy_(content)
                    p.grad = grad
            random.setstate(python_random)
            np.random.set_state(numpy_random)
