"""The names of sites in annotated models, which are compiled block by block, and in functions around modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import Plans, plans_of
from helpers.models import mlp
from torch import Tensor, nn

from approx_compile import Backend, annotate
from approx_compile.backend import run_as_is

ALWAYS: dict[str, Any] = {"policy": "always", "ratio": 0.5, "group": 1}


@pytest.mark.slow
def test_blocks_compiled_one_by_one_take_rules_by_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model = nn.Sequential(*(Block() for _ in range(12)))
    annotate(model)
    keys = set(model.state_dict())
    options = ALWAYS | {"rules": [{"layers": ["3.*", "7.a"], "ratio": 0.25}]}
    plans = Plans()
    for block in model:
        block.compile(backend=Backend(options, inner_compile=run_as_is, on_plan=plans))
    model(torch.randn(32, 64)).sum().backward()
    # five compiles for twelve blocks, within Dynamo's limit of eight: the first (its input needs no gradient), the next ones, the two that the rules
    # name, and the one with the model's last layer
    assert [[s.products[0].k for s in p.sites] for p in plans] == [[32, 32], [32, 32], [16, 16], [16, 32], [32, 32]]
    assert [s.name for s in plans[2].sites] == ["3.a", "3.b"]
    assert set(model.state_dict()) == keys


def test_annotate_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"got dict; the model"):
        annotate({})  # type: ignore[arg-type]


def test_rules_reach_unannotated_blocks_by_their_own_names() -> None:
    block = mlp(64, 64, 64)
    sites = plans_of(block, ALWAYS | {"rules": [{"layers": "2", "method": "exact"}]}, torch.randn(8, 64))
    assert [(s.name, s.decision) for s in sites] == [("0", "sampled"), ("2", "exact")]


@pytest.mark.slow
def test_functions_around_modules() -> None:
    encoder, decoder = mlp(64, 64), nn.Linear(64, 64)
    one = plans_of(lambda x: F.relu(encoder(x)), ALWAYS, torch.randn(8, 64))
    assert len(one) == 1 and one[0].name.endswith("0")

    def both(encoder: nn.Module, decoder: nn.Module, x: Tensor) -> Tensor:
        return decoder(F.relu(encoder(x)))

    class Trainer:
        """Holds the model as an attribute, and others in a list."""

        def __init__(self) -> None:
            self.model, self.heads = mlp(64, 64, 64), [nn.Linear(64, 64)]

        def step(self, x: Tensor) -> Tensor:
            return self.model(x)

        def with_head(self, x: Tensor) -> Tensor:
            return self.heads[0](self.model(x))

    trainer = Trainer()
    assert [(s.name, s.decision) for s in plans_of(trainer.step, ALWAYS, torch.randn(8, 64))] == [("0", "sampled"), ("2", "sampled")]
    trainer.model.eval()
    sites = plans_of(trainer.with_head, ALWAYS, torch.randn(8, 64))
    assert [(s.name, s.decision) for s in sites] == [("self.model.0", "exact"), ("self.model.2", "exact"), ("self.heads[0]", "sampled")]

    sites = plans_of(both, ALWAYS | {"rules": [{"layers": "decoder", "method": "exact"}]}, encoder, decoder, torch.randn(8, 64))
    assert [(s.name, s.decision) for s in sites] == [("encoder.0", "sampled"), ("decoder", "exact")]


@pytest.mark.slow
def test_annotated_blocks_know_the_models_last_layer_without_rules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(512, 512), nn.Linear(512, 512)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(torch.relu(self.a(x)))

    model = nn.Sequential(*(Block() for _ in range(3)))
    annotate(model)
    plans = Plans()
    for block in model:
        block.compile(backend=Backend({"ratio": 0.25}, inner_compile=run_as_is, on_plan=plans))
    model(torch.randn(4096, 512, requires_grad=True))
    found = {s.name: s.decision for s in plans.sites}
    assert found == {"0.a": "sampled", "0.b": "sampled", "2.a": "sampled", "2.b": "exact"}
    assert plans.sites[-1].reason.startswith("the last layer")
