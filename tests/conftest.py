import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")

import pytest
import torch

from approx_compile import notices


@pytest.fixture(autouse=True)
def fresh():
    """Every test starts with no compiled code, no notice given, and the same seed."""
    torch._dynamo.reset()
    notices.forget()
    torch.manual_seed(0)
    yield
