"""The cache key covers every file of the package, so that code which another version compiled is never used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import approx_compile

PACKAGE = Path(approx_compile.__file__).parent

CHILD = """
import json, pathlib, sys
from approx_compile.passes.joint_graph_pass import code_version
root = pathlib.Path(sys.argv[1])
assert pathlib.Path(sys.modules["approx_compile"].__file__).parent == root
def version():
    code_version.cache_clear()
    return code_version()
first = version()
changed = {}
for path in sys.argv[2:]:
    path = root / path
    before = path.read_bytes()
    path.write_bytes(before + b"\\n")
    changed[str(path.relative_to(root))] = version() != first
    path.write_bytes(before)
assert version() == first
print(json.dumps(changed))
"""


@pytest.mark.slow
def test_a_change_in_any_folder_is_another_version(tmp_path: Path) -> None:
    """In every folder of the package one source is changed, of one kind of source at a time."""
    root = tmp_path / "approx_compile"
    shutil.copytree(PACKAGE, root, ignore=shutil.ignore_patterns("__pycache__"))
    sources = sorted(p.relative_to(root) for p in root.rglob("*") if p.suffix in (".py", ".cu", ".cuh"))
    one_each = {(p.parent, p.suffix): p for p in sources}
    folders = {p.parent for p in sources}
    assert len(folders) > 15 and Path("passes/planning") in folders and Path("kernels/cuda") in folders
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root), *map(str, one_each.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    changed = json.loads(done.stdout)
    assert len(changed) == len(one_each) and all(changed.values()), changed
