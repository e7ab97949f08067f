"""The user's configuration: settings, rules by layer and step, plan files and presets. They are checked here, and resolved for every site of a model."""

from approx_compile.config.approx_config import ApproxConfig, ConfigError

__all__ = ["ApproxConfig", "ConfigError"]
