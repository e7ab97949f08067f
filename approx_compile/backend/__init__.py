"""What `torch.compile` calls, and what it gets back: a graph captured and compiled with the joint-graph pass, and what runs between the steps."""

from approx_compile.backend.approx_backend import DISABLE, Backend, approx, inductor_patches, run_as_is

__all__ = ["DISABLE", "Backend", "approx", "inductor_patches", "run_as_is"]
