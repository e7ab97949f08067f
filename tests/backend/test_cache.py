"""Two processes, one cache folder, different settings: warm where nothing changed, and never another setting's code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.cache_child import CASES, ROWS

CHILD = Path(__file__).parents[1] / "helpers" / "cache_child.py"


def run(folder: Path, names: list[str], version: str | None = None, **env: str) -> tuple[dict[str, Any], str]:
    arguments = [sys.executable, str(CHILD), ",".join(names), *([version] if version else [])]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_COMPILE_THREADS": "1"} | env
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def uncached(folder: Path) -> dict[str, Any]:
    """Every case with AOTAutograd's and Inductor's graph caches off (compiled kernels are shared: their key is their source)."""
    return run(folder, list(CASES), TORCHINDUCTOR_FX_GRAPH_CACHE="0", TORCHINDUCTOR_AUTOGRAD_CACHE="0")[0]


@pytest.mark.slow
def test_settings_differ_where_no_cache_is_used(uncached: dict[str, Any]) -> None:
    for suffix in ("", "+checkpoint"):
        distinct = {tuple(uncached[name + suffix]["grads"]) for name in CASES}
        assert len(distinct) == len(CASES)  # else a stale hit could not be seen
    assert all(found["hits"] == 0 for found in uncached.values())


@pytest.mark.slow
def test_processes_that_share_a_cache(uncached: dict[str, Any], folder: Path) -> None:
    """The first process fills the cache with all settings, the second meets them in another order."""
    cold, _ = run(folder, list(CASES))
    warm, notices = run(folder, list(reversed(CASES)))
    for name, want in uncached.items():
        assert cold[name]["grads"] == want["grads"], name
        assert warm[name]["grads"] == want["grads"], name
        assert cold[name]["hits"] == 0, name
        assert (warm[name]["hits"], warm[name]["misses"], warm[name]["bypasses"]) == (1, 0, 0), name
    # after a hit the pass does not run; the user is told all the same
    assert "Net: FORWARD PASS SAMPLED in 3 of 3 layers" in notices


@pytest.mark.slow
def test_another_code_version_does_not_hit(uncached: dict[str, Any], folder: Path) -> None:
    names = ["half", "second"]
    run(folder, names)
    other, _ = run(folder, names, "another version")
    assert all(found["hits"] == 0 and found["misses"] == 1 for found in other.values())
    assert all(other[name]["grads"] == uncached[name]["grads"] for name in other)


@pytest.mark.slow
def test_rows_that_share_a_cache(folder: Path) -> None:
    """Inductor's own cache serves the pieces of such graphs, in the process that filled it and in the next, and never another setting's."""
    want, _ = run(folder, list(ROWS), TORCHINDUCTOR_FX_GRAPH_CACHE="0", TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    for suffix in ("", "+checkpoint"):
        assert len({tuple(want[name + suffix]["grads"]) for name in ROWS}) == len(ROWS)
    cold, _ = run(folder, list(ROWS))
    warm, notices = run(folder, list(reversed(ROWS)))
    for name, found in want.items():
        assert cold[name]["grads"] == found["grads"] and warm[name]["grads"] == found["grads"], name
        assert (warm[name]["hits"], warm[name]["graph_misses"]) == (0, 0) and warm[name]["graph_hits"] >= 2, name
    assert "Net: forward exact. Backward on 25 % to 50 % of the samples" in notices
