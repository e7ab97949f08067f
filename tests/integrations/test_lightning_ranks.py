"""Lightning's Trainer on two processes that Lightning itself starts, as `helpers/lightning_child.py` does. Other frameworks: `test_several_ranks.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from approx_compile import controls

pytest.importorskip("lightning")

from helpers import lightning_child as child

pytestmark = [pytest.mark.integrations, pytest.mark.distributed, pytest.mark.slow, pytest.mark.usefixtures("one_thread", "small_work_counts")]


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_of_two_processes(tmp_path: Path) -> None:
    """It repeats the uninterrupted one bit for bit, with equal parameters on both ranks and a share for each. One process alone goes on with rank 0's share."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "helpers.lightning_child", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(child.RANKS))
    assert first["repeats"] and second["repeats"]
    assert first["parameters"] == second["parameters"]
    assert first["step"] == second["step"] == 2 * child.STEPS
    assert first["changes"][-1][1] < second["changes"][-1][1]

    checkpoint = tmp_path / "whole" / "0.ckpt"
    states = torch.load(checkpoint, weights_only=False)["callbacks"]["ApproxCallback"]["ranks"]
    saved = [control["changes"] for state in states for part in state["controls"].values() for control in part.values() if "changes" in control]
    assert len(saved) == child.RANKS and saved[0][-1][1] < saved[1][-1][1]
    alone = child.fitted(tmp_path / "alone", 1, 2, checkpoint)
    (control,) = controls(alone).values()
    assert [list(c) for c in control.changes][: len(saved[0])] == saved[0]
    assert control.step == child.STEPS + child.STEPS * child.RANKS
