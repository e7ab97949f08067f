"""Collect the options that Inductor compiles with: those of a mode, those of the `inductor` key, and the custom passes."""

from __future__ import annotations

from typing import Any

from approx_compile import _torch
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.passes.joint_graph_pass import ApproxPass


def inductor_patches(config: ApproxConfig, mode: str | None) -> dict[str, Any]:
    """Collect Inductor's options: those of the mode, overridden by those of the `inductor` key.

    Args:
        config: The user's settings, whose `inductor` key may name a mode of its own.
        mode: The mode that `torch.compile(mode=...)` was given, if any.

    Returns:
        Names of `torch._inductor.config` and their values.

    Raises:
        ConfigError: If the mode is unknown, or two different modes are given.
    """
    options = dict(config.inductor)
    configured_mode = options.pop("mode", None)
    if mode is not None and mode not in _torch.inductor_modes():
        raise ConfigError(f"mode: got {mode!r}; valid are {', '.join(_torch.inductor_modes())}")
    if mode is not None and configured_mode is not None and mode != configured_mode:
        raise ConfigError(f"mode: torch.compile got {mode!r} and options['inductor']['mode'] {configured_mode!r}; give one")
    return _torch.mode_options(mode or configured_mode) | {str(k).replace("-", "_"): v for k, v in options.items()}


def after_user_passes(approx_pass: ApproxPass) -> Any:
    """Order the joint-graph passes: the passes that the user has set in `torch._inductor.config` run before this package's pass.

    Args:
        approx_pass: This package's pass.

    Returns:
        A value for Inductor's option `joint_custom_pre_pass`.
    """
    user_passes = _torch.user_joint_passes()
    return [*user_passes, approx_pass] if user_passes else approx_pass
