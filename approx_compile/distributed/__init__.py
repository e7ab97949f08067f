"""Data-parallel training: exchange only those slices of the gradients that the ranks have computed."""

from approx_compile.distributed.reduced_all_reduce import ReducedAllReduce, register

__all__ = ["ReducedAllReduce", "register"]
