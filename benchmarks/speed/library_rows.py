"""A training step of library models on a quarter of the rows, against Inductor.

The models are BERT, GPT-2, Llama, ViT, T5, Whisper, CLIP and their kin, of width 256, with random weights. Inductor (with its guards against torch's known
faults) and `grad={"axis": "rows", "ratio": 0.25}` take steps without the optimizer in turn, in one process for each model; one row a model in
results/library_rows.csv. Bar: 1.5. Needs the extra `conformance` (`make conformance` installs it).
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

_SPEC = importlib.util.spec_from_file_location("conformance_models", Path(__file__).resolve().parents[2] / "tests" / "conformance" / "models.py")
assert _SPEC is not None and _SPEC.loader is not None
sys.modules["conformance_models"] = conformance = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(conformance)
conformance.offline()  # no library asks a hub
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type] # else the link at the top of the checkout is taken for the library of that name

import torch  # noqa: E402
import typer  # noqa: E402
from torch import nn  # noqa: E402

from approx_compile import Backend  # noqa: E402
from approx_compile._torch import known_faults  # noqa: E402
from approx_compile.passes.planning.plan import Plan  # noqa: E402
from approx_compile.tools.compare import loss_of, race  # noqa: E402
from benchmarks.common.rows import conditions, console, show, store  # noqa: E402

BAR = 1.5
WIDTH, LAYERS, HEADS, VOCABULARY = 256, 4, 4, 2000
ENCODER = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {**ENCODER, "num_key_value_heads": HEADS}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
IMAGES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH, "image_size": 64, "patch_size": 8}
Data = dict[str, Any]
Make = Callable[[int], tuple[nn.Module, Data]]


def hugging_face(name: str, data: Callable[[int], Data], config: str | None = None, **settings: Any) -> Make:
    def make(batch: int) -> tuple[nn.Module, Data]:
        library = importlib.import_module("transformers")
        return getattr(library, name)(getattr(library, config or name.split("For")[0] + "Config")(**settings)), data(batch)

    return make


def timm(name: str, size: int, **settings: Any) -> Make:
    return lambda batch: (
        importlib.import_module("timm").create_model(name, img_size=size, num_classes=10, **settings),
        {"x": torch.randn(batch, 3, size, size)},
    )


def text(labels: str = "") -> Callable[[int], Data]:
    def data(batch: int) -> Data:
        ids = torch.randint(2, VOCABULARY, (batch, 64))
        more = {"tokens": {"labels": ids}, "sample": {"labels": ids[:, 0] % 2}}.get(labels, {})
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more

    return data


def pixels(batch: int) -> Data:
    return {"pixel_values": torch.randn(batch, 3, 64, 64)}


def lora(batch: int) -> tuple[nn.Module, Data]:
    peft = importlib.import_module("peft")
    model, data = WORKS["LlamaForCausalLM"](batch)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)), data


WORKS: dict[str, Make] = {
    "BertForSequenceClassification": hugging_face("BertForSequenceClassification", text("sample"), **ENCODER, **DROPOUT),
    "BertForMaskedLM": hugging_face("BertForMaskedLM", text("tokens"), **ENCODER, **DROPOUT),
    "GPT2LMHeadModel": hugging_face("GPT2LMHeadModel", text("tokens"), config="GPT2Config", **GPT2),
    "LlamaForCausalLM": hugging_face("LlamaForCausalLM", text("tokens"), **DECODER, use_cache=False),
    "ViTForImageClassification": hugging_face("ViTForImageClassification", pixels, **IMAGES, **DROPOUT),
    "timm vit": timm("vit_tiny_patch16_224", 64, patch_size=8, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS),
    "timm deit": timm("deit_tiny_patch16_224", 64, patch_size=8, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS),
    "timm swin": timm("swin_tiny_patch4_window7_224", 56, embed_dim=WIDTH // 2, depths=(2, 2), num_heads=(4, 8), drop_path_rate=0.0),
    "timm convnext": lambda batch: (
        importlib.import_module("timm").create_model("convnext_tiny", num_classes=10, depths=(1, 1, 2, 1), dims=(128, 256, 512, 512)),
        {"x": torch.randn(batch, 3, 64, 64)},
    ),
    "T5ForConditionalGeneration": hugging_face(
        "T5ForConditionalGeneration",
        text("tokens"),
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=64, d_ff=4 * WIDTH, num_layers=2, num_heads=HEADS, dropout_rate=0.0, decoder_start_token_id=0,
    ),
    "WhisperForConditionalGeneration": hugging_face(
        "WhisperForConditionalGeneration",
        lambda batch: {"input_features": torch.randn(batch, 16, 128), "labels": torch.randint(3, VOCABULARY, (batch, 32))},
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=4 * WIDTH, decoder_ffn_dim=4 * WIDTH, num_mel_bins=16, max_source_positions=64, max_target_positions=64, begin_suppress_tokens=None,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "CLIPModel": hugging_face(
        "CLIPModel",
        lambda batch: text()(batch) | pixels(batch) | {"return_loss": True},
        config="CLIPConfig",
        text_config={**ENCODER, "max_position_embeddings": 64, "eos_token_id": 2}, vision_config=IMAGES, projection_dim=WIDTH,
    ),
    "LlamaForCausalLM, LoRA": lora,
}  # fmt: skip


def row(name: str, batch: int, rounds: int, ratio: float) -> dict[str, Any]:
    plans: list[Plan] = []
    ours = Backend({"grad": {"axis": "rows", "ratio": ratio}, "policy": "adaptive"}, on_plan=lambda plan, before, after: plans.append(plan))
    steps, first = {}, {}
    for who, backend in (("inductor", known_faults.inductor), ("rows", ours)):
        torch.manual_seed(0)
        model, data = WORKS[name](batch)
        steps[who] = stepper(torch.compile(model.train(), backend=backend), model, data)
        begin = time.perf_counter()
        steps[who]()
        first[who] = time.perf_counter() - begin
    times = race(steps, rounds)
    base, on_rows = (statistics.median(times[s]) for s in ("inductor", "rows"))
    ratios = [a / b for a, b in zip(times["inductor"], times["rows"], strict=True)]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    cuts = [c for plan in plans for c in plan.cuts]
    return conditions() | {
        "work": name,
        "batch": batch,
        "ratio": ratio,
        "decision": "; ".join(dict.fromkeys(c.decision for c in cuts)),
        "share_on_rows": round(sum(c.flops_on_rows for c in cuts) / max(1, sum(c.flops_all for c in cuts)), 3),
        "inductor_ms": round(base, 2),
        "rows_ms": round(on_rows, 2),
        "rounds": rounds,
        "speedup": round(statistics.median(ratios), 3),
        "p20": round(fifths[0], 3),
        "p80": round(fifths[-1], 3),
        "first_inductor_s": round(first["inductor"], 1),
        "first_rows_s": round(first["rows"], 1),
    }


def stepper(compiled: Callable[..., Any], model: nn.Module, data: Data) -> Callable[[], None]:
    def step() -> None:
        for p in model.parameters():
            p.grad = None
        loss_of(compiled(**data)).backward()

    return step


def main(
    work: Annotated[list[str] | None, typer.Option(help="only these models; all by default")] = None,
    batch: Annotated[int, typer.Option(help="samples in a batch")] = 32,
    ratio: Annotated[float, typer.Option(help="share of the rows that is kept")] = 0.25,
    rounds: Annotated[int, typer.Option(help="timed steps of each")] = 12,
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its own choice")] = 0,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if unknown := set(work or ()) - set(WORKS):
        raise typer.BadParameter(f"--work: got {', '.join(sorted(unknown))}; valid are {', '.join(WORKS)}")
    if work is None or len(work) > 1:  # a process for each: models of one process take each other's caches and memory
        for name in work or WORKS:
            if os.spawnv(
                os.P_WAIT, sys.executable, [sys.executable, "-m", "benchmarks.speed.library_rows", "--work", name, *_same(batch, ratio, rounds, threads)]
            ):
                console.print(f"{name}: not measured, see above")
        return
    result = row(work[0], batch, ratio=ratio, rounds=rounds)
    store("library_rows", [result])
    show("training step on rows against Inductor", [result], ("work", "decision", "share_on_rows", "inductor_ms", "rows_ms", "speedup", "p20", "p80"))
    console.print(f"bar {BAR}: {'met' if result['speedup'] >= BAR else 'missed'}")


def _same(batch: int, ratio: float, rounds: int, threads: int) -> list[str]:
    return ["--batch", str(batch), "--ratio", str(ratio), "--rounds", str(rounds), "--threads", str(threads)]


if __name__ == "__main__":
    typer.run(main)
