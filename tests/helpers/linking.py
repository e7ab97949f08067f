"""Make Inductor's kernels quicker to compile."""

import ctypes
import os
import sys
from pathlib import Path

import torch
import torch._inductor.config


def link_without_torch() -> None:
    """Do not link kernels with torch's libraries, which takes a quarter of the time of compiling one: they are loaded already and need only be visible."""
    if sys.platform == "linux":
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_python.so"), mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
        torch._inductor.config.aot_inductor.link_libtorch = False
