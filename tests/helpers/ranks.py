"""Run functions on several ranks: processes of one gloo group. Starting them costs seconds, so one start runs many cases.

A case is a function of a module, called as `case(rank, world)` on every rank. It raises what fails. After a failing case the other ranks may wait for it in a
collective, so the group has a time limit.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

LIMIT_S = 60
"""The time limit of a collective."""


def run_on_ranks(folder: Path, module: str, cases: Sequence[str], world: int = 2, limit_s: int = 500) -> dict[str, str]:
    """Run cases on the ranks of one group; return what failed by case, in the words of all ranks that failed.

    A case is the name of a function of the module, or one with its own module in front, as `helpers.ddp_cases.resume`.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.ranks", str(folder), module, ",".join(cases), str(world)]
    children = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(world)]
    errors = [child.communicate(timeout=limit_s)[1] for child in children]
    failed: dict[str, str] = {}
    for rank, error in enumerate(errors):
        path = folder / f"{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        for case in cases:
            text = results.get(case, f"did not run:\n{error[-3000:]}")
            if text:
                failed[case] = failed.get(case, "") + f"\nrank {rank}: {text}"
    return failed


def _main(folder: str, module: str, cases: str, world: str, rank: str) -> None:
    import torch
    import torch.distributed as dist

    store = dist.FileStore(f"{folder}/store", int(world))
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=int(world), timeout=datetime.timedelta(seconds=LIMIT_S))
    results: dict[str, str] = {}
    for case in cases.split(","):
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            where, _, name = case.rpartition(".")
            getattr(importlib.import_module(where or module), name)(int(rank), int(world))
            results[case] = ""
        except Exception:
            results[case] = traceback.format_exc()[-3000:]
        Path(f"{folder}/{rank}.json").write_text(json.dumps(results))
        if results[case]:
            break  # the ranks are no longer at the same place
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
