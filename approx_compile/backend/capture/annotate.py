"""Give modules their full names, for models that are compiled block by block.

With `for block in model.layers: block.compile(backend="approx", ...)` the backend sees one block at a time, and equal blocks share one graph. After
`annotate(model)` each module knows its name in the whole model, so that rules by layer work there too. Blocks to which the same rules apply still share their
code.
"""

from __future__ import annotations

import hashlib
import weakref

from torch import nn

from approx_compile.config import ApproxConfig

_NAME = "_approx_compile_name"
_MODEL = "_approx_compile_model"
SIGNATURE = _NAME


def annotate(model: nn.Module) -> nn.Module:
    """Write on every module its full name and a weak link to `model`, as plain attributes that are not parameters, buffers or keys of the `state_dict`.

    Call it once, before the blocks are compiled. A module that occurs twice gets the name of its first occurrence.

    Args:
        model: The whole model.

    Returns:
        The model.

    Raises:
        TypeError: If `model` is not a module.

    Example:
        >>> import torch
        >>> import approx_compile
        >>> model = approx_compile.annotate(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)))
        >>> model[2].compile(backend="approx", options={"rules": [{"layers": "2", "method": "exact"}]})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"annotate: got {type(model).__name__}; the model (a torch.nn.Module) whose blocks are compiled is expected")
    link = Link(model)
    for name, module in model.named_modules():
        module.__dict__[_NAME] = name
        module.__dict__[_MODEL] = link
    return model


class Link:
    """A weak reference to a model. Its deepcopy or pickle is None, because a copied module is not part of this model."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.ref = weakref.ref(model) if model is not None else None

    def __call__(self) -> nn.Module | None:
        """Return the model, or None if it is gone."""
        return self.ref() if self.ref is not None else None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def full_name(module: nn.Module) -> str | None:
    """Look up a module's name in the annotated model.

    Args:
        module: The module.

    Returns:
        The name, or None if the module is not annotated.
    """
    name = module.__dict__.get(_NAME)
    return name if isinstance(name, str) else None


def whole_model(module: nn.Module) -> nn.Module | None:
    """Look up the annotated model that a module belongs to.

    Args:
        module: The module.

    Returns:
        The model, or None if the module is not annotated or the model is gone.
    """
    link = module.__dict__.get(_MODEL)
    return link() if isinstance(link, Link) else None


def last_module(root: nn.Module | None) -> str | None:
    """Find the last module, in the order of registration, that has a matrix among its parameters.

    Args:
        root: The module that is compiled.

    Returns:
        Its full name; None if `root` is not a part of an annotated model.
    """
    model = whole_model(root) if root is not None else None
    if model is None or model is root:
        return None
    names = [n for n, m in model.named_modules() if any(p.dim() >= 2 for p in m.parameters(recurse=False))]
    return names[-1] if names else None


def sign(root: nn.Module, config: ApproxConfig) -> str | None:
    """Write on every module of an annotated model a signature: a digest of which rules' name patterns match the modules below it.

    The backend guards the signature, so that blocks with equal signatures share compiled code.

    Args:
        root: The module that is compiled.
        config: The settings.

    Returns:
        The name of the attribute to guard; None if `root` is not annotated.
    """
    model = whole_model(root)
    if model is None:
        return None if full_name(root) is None else _NAME
    patterns = [[p for p in rule.patterns if p.is_name] for rule in config.rules]
    attribute = f"_approx_compile_rules_{config.digest()[:12]}"
    last = last_module(root)
    for name, module in model.named_modules():
        matches = []
        for below, _ in module.named_modules():
            whole = ".".join(p for p in (name, below) if p)
            matches.append((below, whole == last, [any(p.matches_name(whole) for p in rule) for rule in patterns]))
        module.__dict__[attribute] = hashlib.sha256(repr(matches).encode()).hexdigest()
    return attribute


def annotation_of(attribute: str) -> bool:
    """Tell whether an attribute of a module was written by this package.

    Args:
        attribute: The attribute's name.

    Returns:
        True if it was.
    """
    return attribute.startswith("_approx_compile_")
