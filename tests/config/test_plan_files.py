"""Plan files that are written can be read, edited and overridden, and a plan that does not fit is refused with the place of the error."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.compile import compiled, plans_of
from helpers.models import mlp
from torch import nn

from approx_compile import ApproxConfig, ApproxWarning, Backend, ConfigError, TunedPlan, annotate
from approx_compile.backend import run_as_is
from approx_compile.config.plan_file import Tuned, TunedSite

EXACT = tuple(TunedSite(name=name, op="addmm", shape="8x64x64", dtype="float32") for name in ("2", "4"))
SITES = (TunedSite(name="0", op="addmm", shape="8x64x64", dtype="float32", ratio=0.5, saved=0.125, error=0.1), *EXACT)
RECORD = Tuned(model="Sequential", torch="2.13.0", device="cpu", threads=1, max_error=0.25, error=0.1, predicted_speedup=1.14, sites=SITES)
OPTIONS: dict[str, Any] = {"policy": "always", "method": "exact", "rules": [{"layers": "0", "method": "topk", "ratio": 0.5, "group": 1}]}
PLAN = TunedPlan(OPTIONS, RECORD, {"0": "saves 12.5% of the step"})


def kept(config: Any, model: nn.Module | None = None, batch: int = 8) -> list[int]:
    """Return how many of 64 entries every site of a 64-64-64-64 net keeps."""
    return [s.products[0].k for s in plans_of(model or mlp(64, 64, 64, 64), config, torch.randn(batch, 64))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    PLAN.save(tmp_path / "plan.toml")
    return tmp_path / "plan.toml"


@pytest.mark.slow
def test_what_is_saved_is_read(path: Path) -> None:
    text = path.read_text()
    assert 'layers = "0" # saves 12.5% of the step' in text and "[[rules]]" in text and "[tuned]" in text
    assert TunedPlan.load(path) == PLAN
    assert TunedPlan.of(PLAN.to_dict(), "") == PLAN
    assert kept({"plan": str(path)}) == kept({"plan": path}) == kept({"plan": PLAN}) == kept({"plan": PLAN.to_dict()}) == [32, 64, 64]


@pytest.mark.slow
def test_the_string_backend_runs_it(path: Path) -> None:
    model = mlp(64, 64, 64, 64)
    x = torch.randn(8, 64)
    own, _, _ = compiled(copy.deepcopy(model), {k: v for k, v in OPTIONS.items()})
    assert torch.allclose(torch.compile(model, backend="approx", options={"plan": str(path)})(x), own(x), rtol=1e-4, atol=1e-5)


def test_a_hand_edit_counts(path: Path) -> None:
    before = ApproxConfig(plan=path)
    path.write_text(
        path.read_text().replace("ratio = 0.5\ngroup", "ratio = 0.25\ngroup") + '\n[[rules]]\nlayers = "linear[-1]"\nmethod = "crs"\nratio = 0.75\ngroup = 1\n'
    )
    after = ApproxConfig(plan=path)
    assert kept({"plan": path}) == [16, 64, 48]
    assert before.digest() != after.digest() and before != after


def test_the_content_and_not_the_path_is_in_the_digest(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("# a comment\n" + path.read_text())
    assert ApproxConfig(plan=path) == ApproxConfig(plan=tmp_path / "other.toml")
    assert ApproxConfig(plan=path).digest() == ApproxConfig(plan=PLAN).digest()
    moved = RECORD.model_copy(update={"sites": SITES[:2]})
    assert ApproxConfig(plan=TunedPlan(OPTIONS, moved)).digest() != ApproxConfig(plan=PLAN).digest()
    assert ApproxConfig(**OPTIONS).digest() != ApproxConfig(plan=PLAN).digest()  # the plan's sites are checked, the bare settings' are not


def test_a_config_with_a_plan_is_like_any_other() -> None:
    config = ApproxConfig(plan=PLAN)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(copy.deepcopy(config))
    assert config.plan == RECORD and [r.layers for r in config.rules] == [("0",)]


@pytest.mark.parametrize(
    ("own", "found"),
    [
        ({"ratio": 0.25}, [16, 64, 64]),  # where the plan samples; what it leaves exact stays so
        ({"method": "uniform", "ratio": 0.75}, [48, 64, 64]),
        ({"min_k": 64}, [64, 64, 64]),
        ({"method": "exact"}, [64, 64, 64]),
        ({"method": "exact", "rules": [{"layers": "2", "method": "topk", "ratio": 0.5, "group": 1}]}, [64, 32, 64]),
        ({"rules": [{"layers": "4", "method": "topk", "ratio": 0.25, "group": 1}]}, [32, 64, 16]),
        ({"rules": [{"layers": "0", "method": "exact"}]}, [64, 64, 64]),
    ],
)
def test_options_beside_a_plan_override_it(own: dict[str, Any], found: list[int]) -> None:
    assert kept({"plan": PLAN} | own) == found


def test_options_beside_a_plan_on_rows() -> None:
    plan = TunedPlan({"policy": "always", "ratio": 0.5, "grad": {"axis": "rows"}})
    ratio = lambda **own: ApproxConfig(plan=plan, **own).settings([]).rows.ratio  # noqa: E731
    assert ratio() == 0.5 and ratio(ratio=0.25) == 0.25
    assert ApproxConfig(plan=plan, method="exact").settings([]).rows is None


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made for Sequential with 3 sites and does not fit Sequential, which lacks 4\. Tune"):
        kept({"plan": path}, mlp(64, 64, 64))
    with pytest.raises(ConfigError, match=r"other weights: 2 is 8x64x32, in the plan 8x64x64; 4 is 8x32x64, in the plan 8x64x64\."):
        kept({"plan": path}, mlp(64, 64, 32, 64))
    without = TunedPlan(OPTIONS)  # a file written by hand names no sites
    assert kept({"plan": without}, mlp(64, 64, 64)) == [32, 64]


def test_another_batch_and_new_sites_are_told(path: Path) -> None:
    with pytest.warns(ApproxWarning, match=r"tuned with other inputs \(0 is 4x64x64, in the plan 8x64x64\)"):
        torch.compile(mlp(64, 64, 64, 64), backend=Backend({"plan": path}, inner_compile=run_as_is))(torch.randn(4, 64))
    with pytest.warns(ApproxWarning, match="says nothing of 6"):
        torch.compile(mlp(64, 64, 64, 64, 64), backend=Backend({"plan": path}, inner_compile=run_as_is))(torch.randn(8, 64))


def test_blocks_compiled_one_by_one(path: Path) -> None:
    blocks = nn.Sequential(*[mlp(64, 64)[0] for _ in range(3)])
    sites = tuple(s.model_copy(update={"name": str(i)}) for i, s in enumerate(SITES))
    plan = TunedPlan(OPTIONS, RECORD.model_copy(update={"sites": sites}))
    with pytest.raises(ConfigError, match="annotate"):
        kept({"plan": plan}, nn.Sequential(blocks[0]))
    annotate(blocks)
    assert [kept({"plan": plan}, b) for b in blocks] == [[32], [64], [64]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("ratio = 0.5\ngroup", "ratio = \ngroup"), "plan.toml' is no TOML: .*line 9"),
        (("ratio = 0.5\ngroup", "ratio = 5\ngroup"), r"plan.toml': rules\[0\].ratio: got 5"),
        (('method = "topk"', 'methid = "topk"'), r"plan.toml': rules\[0\]: unknown key 'methid'.*'method'"),
        (("threads = 1", 'threads = "many"'), "plan.toml': tuned.threads: .*leave the table 'tuned' out"),
        (('shape = "8x64x64"', "shape = 8"), r"plan.toml': tuned.sites\[0\].shape"),
        (("policy", 'plan = "other.toml"\npolicy'), "holds no other plan"),
    ],
)
def test_a_damaged_file_says_where(path: Path, damage: tuple[str, str], message: str) -> None:
    text = path.read_text()
    assert damage[0] in text
    path.write_text(text.replace(*damage, 1))
    with pytest.raises(ConfigError, match=message):
        ApproxConfig(plan=path)


def test_no_file_and_no_plan(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml': No such file"):
        ApproxConfig(plan=tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="got 3; the path of a plan file"):
        ApproxConfig(plan=3)
    with pytest.raises(ConfigError, match="ratio: got 2"):  # the key beside the plan, not the file
        ApproxConfig(plan=PLAN, ratio=2)


def test_the_table_has_predicted_and_achieved() -> None:
    text = str(TunedPlan(OPTIONS, RECORD.model_copy(update={"achieved_speedup": 1.1, "step_ms": 9.0, "step_exact_ms": 9.9})))
    assert "predicted 1.14x, achieved 1.10x (9.9 ms -> 9 ms a step)" in text and "12.5%" in text and "0.100, at most 0.25" in text
    assert "achieved not measured" in str(PLAN)
