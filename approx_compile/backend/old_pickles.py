"""Let pickles load that were written when classes stood in other modules: configs, plans, backends and annotated models.

Pickles written now hold a config's options, the arguments of a backend and the names of annotated modules, and none of these classes except `TunedPlan`.
"""

from __future__ import annotations

import sys
from types import ModuleType

from approx_compile.backend.capture.annotate import Link
from approx_compile.backend.runtime.schedule import Schedule
from approx_compile.config.adaptive import AdaptiveTable
from approx_compile.config.plan_file import Tuned, TunedPlan, TunedSite
from approx_compile.config.rules import Rule
from approx_compile.config.schema import GradTable, InputTable, OutputTable, WeightTable
from approx_compile.config.selectors import ActivePeriod, StepSlice

_CLASSES: dict[str, dict[str, type]] = {
    "annotate": {"_Link": Link},
    "patterns": {"Steps": StepSlice, "When": ActivePeriod},
    "plans": {c.__name__: c for c in (Tuned, TunedPlan, TunedSite)},
    "schedule": {"Schedule": Schedule},
    "tables": {c.__name__: c for c in (AdaptiveTable, GradTable, InputTable, Rule, WeightTable)} | {"ProductTable": OutputTable},
}
"""The classes by the module and the name that old pickles hold."""


def register() -> None:
    """Make each old module importable, with the classes that it had."""
    for name, classes in _CLASSES.items():
        module = ModuleType(f"approx_compile.{name}", "The former place of these classes, for old pickles.")
        vars(module).update(classes)
        sys.modules[module.__name__] = module
