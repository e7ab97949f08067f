"""approx_compile: a torch.compile backend that trains with approximate matrix products and convolutions."""

from approx_compile import presets
from approx_compile.annotate import annotate
from approx_compile.backend import Backend
from approx_compile.config import ApproxConfig, ConfigError
from approx_compile.control import Control, controls
from approx_compile.decisions import Decisions, decisions
from approx_compile.once import ApproxWarning
from approx_compile.plans import TunedPlan
from approx_compile.report import Report, explain
from approx_compile.schedule import set_phase, set_step
from approx_compile.state import load_state_dict, state_dict
from approx_compile.tune import tune

__version__ = "0.1.0"
__all__ = [
    "ApproxConfig",
    "ApproxWarning",
    "Backend",
    "ConfigError",
    "Control",
    "Decisions",
    "Report",
    "TunedPlan",
    "annotate",
    "controls",
    "decisions",
    "explain",
    "load_state_dict",
    "presets",
    "set_phase",
    "set_step",
    "state_dict",
    "tune",
]
