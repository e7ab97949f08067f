"""The wheel holds the entry point and the sources of every pass and kernel, and no top-level names from the repository's folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
"""An environment in which a child sees what is installed, and no more: a checkout on its path would lend it the links to our folders."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {p.relative_to(ROOT).as_posix() for kind in ("*.py", "*.cu", "*.cuh") for p in (ROOT / "approx_compile").rglob(kind)}
    assert "approx_compile/kernels/cuda/skip_matmul.cu" in sources
    assert sources | {"approx_compile/tools/report/report.html.j2"} <= set(names)
    assert {n.split("/")[0] for n in names if not n.split("/")[0].endswith(".dist-info")} == {"approx_compile"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, capture_output=True, env=INSTALLED)
    code = """
import importlib.util as u, importlib.metadata as m
assert u.find_spec("passes") is None and u.find_spec("kernels") is None
assert u.find_spec("approx_compile") is not None
(e,) = [e for e in m.entry_points(group="torch_dynamo_backends")]
assert (e.name, e.value) == ("approx", "approx_compile.backend:approx"), e
print("good")
"""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=INSTALLED)
    assert done.stdout.strip() == "good", done.stderr


@pytest.mark.slow
def test_installed_command(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", home, wheel], check=True, capture_output=True)
    (tmp_path / "small.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(64, 32), torch.randn(8, 64)\n")
    command = [home / "bin" / "approx-compile", "explain", "small.py:make", "--set", "policy=always", "--json", "--html", "report.html"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(home)})
    assert done.returncode == 0, done.stderr
    assert [s["decision"] for s in json.loads(done.stdout)["sites"]] == ["sampled"] and "addmm" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_name_is_registered_without_an_import_and_folders_are_importable_inside_the_package_only(tmp_path: Path) -> None:
    code = """
import torch, sys
assert "approx" in torch._dynamo.list_backends() and "approx_compile" not in sys.modules
import approx_compile.passes.fx_utils, approx_compile.kernels.gather, importlib.util as u
print(u.find_spec("passes"), u.find_spec("kernels"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=INSTALLED)
    assert done.stdout.split() == ["None", "None"], done.stderr
    assert not (ROOT / "passes" / "__init__.py").exists() and (ROOT / "passes").resolve() == ROOT / "approx_compile" / "passes"
