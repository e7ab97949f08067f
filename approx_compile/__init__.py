"""approx_compile: a torch.compile backend that trains with approximate matrix products and convolutions."""

from approx_compile.annotate import annotate
from approx_compile.backend import Backend
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.notices import ApproxWarning
from approx_compile.report import Report, explain

__version__ = "0.1.0"
__all__ = ["ApproxConfig", "ApproxWarning", "Backend", "ConfigError", "Report", "annotate", "explain"]
