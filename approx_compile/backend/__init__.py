"""The backend that `torch.compile` calls: it captures a graph, compiles it with the joint-graph pass, and selects at each step which variant runs.

The entry point `approx` of `torch.compile(model, backend="approx")` is `approx_compile.backend:approx`.
"""

from approx_compile._torch import run_as_is
from approx_compile.backend.approx_backend import Backend, approx
from approx_compile.backend.inductor_options import inductor_patches

__all__ = ["Backend", "approx", "inductor_patches", "run_as_is"]
