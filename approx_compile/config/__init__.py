"""The user's configuration: settings, rules by layer and step, plan files and presets. They are checked here, and resolved for every site of a model."""

from approx_compile.config.approx_config import ApproxConfig, ConfigError, unpickle

__all__ = ["ApproxConfig", "ConfigError", "unpickle"]

unpickle.__module__ = __name__  # pickled configs hold this name
