"""approx_compile: a torch.compile backend that trains with approximate matrix products and convolutions."""

from approx_compile.backend import Backend, old_pickles
from approx_compile.backend.capture.annotate import annotate
from approx_compile.backend.runtime.decisions import Decisions, decisions
from approx_compile.backend.runtime.metrics import metrics
from approx_compile.backend.runtime.state import load_state_dict, state_dict
from approx_compile.config import ApproxConfig, ConfigError, presets
from approx_compile.config.plan_file import TunedPlan
from approx_compile.rows.controller import Control
from approx_compile.rows.ownership import controls
from approx_compile.rows.step_counter import set_phase, set_step
from approx_compile.tools.recommend import Recommendation, recommend
from approx_compile.tools.report.explain import Report, explain
from approx_compile.tools.tuning.tune import tune
from approx_compile.utils import ApproxWarning

__version__ = "0.1.0"
__all__ = [
    "ApproxConfig",
    "ApproxWarning",
    "Backend",
    "ConfigError",
    "Control",
    "Decisions",
    "Recommendation",
    "Report",
    "TunedPlan",
    "annotate",
    "controls",
    "decisions",
    "explain",
    "load_state_dict",
    "metrics",
    "presets",
    "recommend",
    "set_phase",
    "set_step",
    "state_dict",
    "tune",
]

old_pickles.register()
