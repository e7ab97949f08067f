"""Mixtures of experts: rows run where every token's way to its experts and back stays within its sample; where tokens of all samples are sorted, they end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.compile import HALF, rows_of
from helpers.oracles import ChosenRows, grads, grads_under_a_tangent, over_halves
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
EXPERTS, WIDTH, HIDDEN = 4, 6, 8


class Mixture(nn.Module):
    """A layer, experts, a layer, on sequences of tokens; `way` carries the tokens to the experts and back."""

    def __init__(self, way: Callable[[Mixture, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(5, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.way(self, self.first(x).tanh()))
        return out

    def best(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the indices of every token's two experts."""
        weights, chosen = self.router(h).softmax(-1).topk(2, -1)
        return weights / weights.sum(-1, keepdim=True), chosen


def every_expert(m: Mixture, h: Tensor) -> Tensor:
    weights, chosen = m.best(h)
    gates = h.new_zeros(*h.shape[:-1], EXPERTS).scatter(-1, chosen, weights)
    return torch.einsum("bteh,ehd,bte->btd", torch.einsum("btd,edh->bteh", h, m.up).relu(), m.down, gates)


def one_after_the_other(m: Mixture, h: Tensor) -> Tensor:
    weights, chosen = m.best(h)
    gates = [(weights * (chosen == e)).sum(-1, keepdim=True) for e in range(EXPERTS)]
    return torch.stack([g * ((h @ m.up[e]).relu() @ m.down[e]) for e, g in enumerate(gates)]).sum(0)


def weights_of_each_token(m: Mixture, h: Tensor) -> Tensor:
    weights, chosen = m.best(h)
    return torch.einsum("btkh,btkhd,btk->btd", torch.einsum("btd,btkdh->btkh", h, m.up[chosen]).relu(), m.down[chosen], weights)


def tokens_of_all_samples(m: Mixture, h: Tensor) -> Tensor:
    """As `experts_implementation="batched_mm"` of Hugging Face."""
    tokens = h.flatten(0, 1)
    weights, chosen = m.best(tokens)
    each, experts = tokens.repeat_interleave(2, 0), chosen.reshape(-1)
    out = torch.bmm(torch.bmm(each.unsqueeze(1), m.up[experts]).relu(), m.down[experts]).squeeze(1) * weights.reshape(-1, 1)
    return out.view(len(tokens), 2, WIDTH).sum(1).view(h.shape)


def chosen_by_the_experts(m: Mixture, h: Tensor) -> Tensor:
    """Every expert takes the two best tokens of each sample."""
    weights, tokens = m.router(h).softmax(-1).transpose(1, 2).topk(2, -1)
    taken = h.unsqueeze(1).expand(-1, EXPERTS, -1, -1).gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, WIDTH))
    out = torch.einsum("bech,ehd->becd", torch.einsum("becd,edh->bech", taken, m.up).relu(), m.down) * weights.unsqueeze(-1)
    return torch.zeros_like(h).scatter_add(1, tokens.flatten(1).unsqueeze(-1).expand(-1, -1, WIDTH), out.flatten(1, 2))


def places_in_each_sample(m: Mixture, h: Tensor) -> Tensor:
    """Two places for each expert in each sample."""
    gates = m.router(h).softmax(-1)
    chosen = F.one_hot(gates.argmax(-1), EXPERTS).to(h.dtype)
    place = ((chosen.cumsum(1) - 1) * chosen).clamp(max=2).long()
    sent = F.one_hot(place, 3)[..., :2].to(h.dtype) * chosen.unsqueeze(-1)
    out = torch.einsum("bech,ehd->becd", torch.einsum("btec,btd,edh->bech", sent, h, m.up).relu(), m.down)
    return torch.einsum("btec,bte,becd->btd", sent, gates, out)


WITHIN: dict[str, Callable[[Mixture, Tensor], Tensor]] = {
    f.__name__: f for f in (every_expert, one_after_the_other, weights_of_each_token, tokens_of_all_samples, chosen_by_the_experts, places_in_each_sample)
}


def places_in_the_batch(m: Mixture, h: Tensor) -> Tensor:
    """Eight places for each expert in the whole batch: what one sample takes another does not get."""
    tokens = h.flatten(0, 1)
    gates = m.router(tokens).softmax(-1)
    chosen = F.one_hot(gates.argmax(-1), EXPERTS).to(h.dtype)
    place = ((chosen.cumsum(0) - 1) * chosen).clamp(max=8).long()
    sent = F.one_hot(place, 9)[..., :8].to(h.dtype) * chosen.unsqueeze(-1)
    out = torch.einsum("ech,ehd->ecd", torch.einsum("tec,td,edh->ech", sent, tokens, m.up).relu(), m.down)
    return torch.einsum("tec,te,ecd->td", sent, gates, out).view(h.shape)


def sorted_by_expert(m: Mixture, h: Tensor) -> Tensor:
    tokens = h.flatten(0, 1)
    weights, chosen = m.best(tokens)
    order = chosen[:, 0].argsort()
    taken, experts = tokens[order], chosen[:, 0][order]
    out = torch.bmm(torch.bmm(taken.unsqueeze(1), m.up[experts]).relu(), m.down[experts]).squeeze(1)
    return torch.zeros_like(tokens).index_add(0, order, out * weights[order, :1]).view(h.shape)


def as_many_as_come(m: Mixture, h: Tensor) -> Tensor:
    """Every expert gets the tokens that chose it. Their number is data, so that torch breaks the graph."""
    tokens = h.flatten(0, 1)
    weights, chosen = m.best(tokens)
    out = torch.zeros_like(tokens)
    for e in range(EXPERTS):
        token, k = torch.where(chosen == e)
        out.index_add_(0, token, (tokens[token] @ m.up[e]).relu() @ m.down[e] * weights[token, k, None])
    return out.view(h.shape)


ACROSS: dict[str, Callable[[Mixture, Tensor], Tensor]] = {f.__name__: f for f in (places_in_the_batch, sorted_by_expert)}


def against_masked_tangents(way: Callable[[Mixture, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compare gradients with those of the exact model under masked tangents; return the reasons of the cuts."""
    chosen = ChosenRows(monkeypatch)
    model, x = Mixture(way).double(), torch.randn(12, 3, 5, dtype=torch.float64).requires_grad_()
    f, plans = rows_of(model, HALF)
    out = f(x)
    tangent = torch.randn_like(out)
    out.backward(tangent)
    got = grads(model, x)
    mask = chosen.mask(12) if chosen.choices else torch.ones(12)
    model(x).backward(tangent * mask[:, None, None])
    for a, b in zip(got, grads(model, x), strict=True):
        assert (a - b).norm() <= 1e-9 * (1 + b.norm())
    return [str(c.reason) for p in plans for c in p.cuts]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", WITHIN)
def test_tokens_that_stay_in_their_sample_run_on_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert against_masked_tangents(WITHIN[name], monkeypatch) == ["the whole backward pass"]


@pytest.mark.parametrize("name", ACROSS)
def test_tokens_that_are_sorted_over_the_batch_end_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or rows begin below: wherever they are, their mean is right."""
    model, x = Mixture(ACROSS[name]).double(), torch.randn(12, 3, 5, dtype=torch.float64).requires_grad_()
    f, plans = rows_of(model, HALF)

    mean, _ = over_halves(monkeypatch, lambda: grads_under_a_tangent(f, model, x))
    assert not any(c.reason == "the whole backward pass" for p in plans for c in p.cuts)
    for got, want in zip(mean, grads_under_a_tangent(model, model, x), strict=True):
        torch.testing.assert_close(got, want)


def test_where_torch_breaks_the_graph_the_compiled_parts_run_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(against_masked_tangents(as_many_as_come, monkeypatch)) == {"the whole backward pass"}
