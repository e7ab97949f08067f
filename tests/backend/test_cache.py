"""Two processes share a cache folder under different settings: unchanged code comes from the cache, and never the code of other settings."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cache_child import CASES, ROWS

from approx_compile import ApproxConfig
from approx_compile.passes import joint_graph_pass
from approx_compile.passes.sites.site import Context

CHILD = Path(__file__).parents[1] / "helpers" / "cache_child.py"


def run_child(folder: Path, names: list[str], *arguments: str, **env: str) -> tuple[dict[str, Any], str]:
    """Return the results of the cases by name, and what the child process wrote to stderr."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"} | env
    done = subprocess.run([sys.executable, str(CHILD), ",".join(names), *arguments], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def op_by_op(folder: Path) -> dict[str, Any]:
    """The right gradients of every case. Its graphs run op by op, so no cache of code is used."""
    return run_child(folder, [*CASES, *ROWS], "--op-by-op")[0]


def same(got: dict[str, Any], want: dict[str, Any]) -> bool:
    """Return whether the gradients are equal up to rounding. Those of different settings differ by far more, as the first test checks."""
    return bool(np.allclose(got["grads"], want["grads"], rtol=1e-4))


@pytest.mark.slow
def test_settings_differ(op_by_op: dict[str, Any]) -> None:
    """If the settings gave equal gradients, a stale cache hit could not be seen. Checkpointing alone changes no gradient."""
    for names in (CASES, ROWS):
        plain = [n for n in names if "checkpoint" not in n]
        assert not any(same(op_by_op[a], op_by_op[b]) for a, b in itertools.combinations(plain, 2))
    assert all(result["hits"] == result["graph_hits"] == 0 for result in op_by_op.values())


@pytest.mark.slow
def test_processes_that_share_a_cache(op_by_op: dict[str, Any], folder: Path) -> None:
    """The first process fills the cache with all settings; the second compiles them in another order."""
    cold, _ = run_child(folder, list(CASES))
    warm, notices = run_child(folder, list(reversed(CASES)))
    for name in CASES:
        assert same(cold[name], op_by_op[name]), name
        assert warm[name]["grads"] == cold[name]["grads"], name
        assert cold[name]["hits"] == 0, name
        assert (warm[name]["hits"], warm[name]["misses"], warm[name]["bypasses"]) == (1, 0, 0), name
    # after a hit the pass does not run; the user is told all the same
    assert "Net: FORWARD PASS SAMPLED in 3 of 3 layers" in notices
    other, _ = run_child(folder, ["half"], "another version")
    assert (other["half"]["hits"], other["half"]["misses"]) == (0, 1) and same(other["half"], op_by_op["half"])


@pytest.mark.slow
def test_rows_that_share_a_cache(op_by_op: dict[str, Any], folder: Path) -> None:
    """Inductor's cache serves the stages of graphs on rows, in the process that filled it and in the next, and never the code of other settings."""
    cold, _ = run_child(folder, list(ROWS))
    warm, notices = run_child(folder, list(reversed(ROWS)))
    for name in ROWS:
        assert same(cold[name], op_by_op[name]) and warm[name]["grads"] == cold[name]["grads"], name
        assert (warm[name]["hits"], warm[name]["graph_misses"]) == (0, 0) and warm[name]["graph_hits"] >= 2, name
    assert "Net: forward exact. Backward on 25 % to 50 % of the samples" in notices


def test_every_key_is_in_the_cache_key() -> None:
    """Options that differ in one key, of every kind, give different keys."""
    options: list[dict[str, Any]] = [
        {},
        {"policy": "always"},
        {"ratio": 0.5},
        {"ratio": 0.25},
        {"rules": [{"layers": "first", "ratio": 0.25}]},
        {"rules": [{"layers": "second", "ratio": 0.25}]},
        {"rules": [{"layers": "second", "method": "exact"}]},
        {"policy": "always", "sampling": "backward"},
        {"policy": "always", "sampling": "blackbox"},
        {"method": "topk_weights"},
        {"policy": "always", "group": 4},
        {"grad_weight": {"method": "topk", "ratio": 0.25}},
        {"method": "bernoulli", "ratio": 0.25},
        {"grad": {"axis": "rows", "ratio": 0.25}},
        {"grad": {"axis": "rows", "ratio": 0.5}},
        {"grad": {"axis": "rows", "method": "topk", "ratio": 0.5}},
    ]
    keys = {joint_graph_pass.cache_key(ApproxConfig(**o), Context(), ()) for o in options}
    assert len(keys) == len(options)
