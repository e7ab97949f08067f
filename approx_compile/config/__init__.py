"""What the user asks for: settings, rules by layer and step, plan files, presets; checked, and resolved for every site."""

from approx_compile.config.approx_config import ApproxConfig, ConfigError

__all__ = ["ApproxConfig", "ConfigError"]
