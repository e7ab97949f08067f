"""Library models, tiny and with random weights: what `run.py` tries the one line on. Nothing is downloaded.

A model is a factory and its data; the loss is inside (Hugging Face's `labels=`, where `out` finds `.loss`) or left to the caller, who then has logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = dict[str, Any] | tuple[Any, ...]
"""What a model is called with: by keyword or by position."""


@dataclass(frozen=True)
class Model:
    """`data(n)`: a batch of n samples. `loss`: the model itself gives the mean loss. `axis`: of the output, along which samples lie.
    `expected`: why a reader of the model accepts that rows are declined or run in part, where that is known beforehand."""

    name: str
    library: str
    make: Callable[[], nn.Module]
    data: Callable[[int], Data]
    loss: bool = False
    axis: int = 0
    expected: str = ""


MODELS: dict[str, Model] = {}


def add(name: str, library: str, make: Callable[[], nn.Module], data: Callable[[int], Data], **more: Any) -> None:
    assert name not in MODELS, name
    MODELS[name] = Model(name, library, make, data, **more)


def run(model: Callable[..., Any], data: Data) -> Any:
    return model(**data) if isinstance(data, dict) else model(*data)


def out(result: Any, loss: bool) -> Tensor:
    """The loss, or the tensor that a caller would make a loss of."""
    if isinstance(result, Tensor):
        return result
    if loss:
        return result.loss
    for name in ("logits", "last_hidden_state", "sample"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    return result[0]


def offline() -> None:
    """No hub is asked, and torchvision can be imported beside a torch that its operators were not built for (models need none of them)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError):
        for name in ("nms", "qnms"):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def without_dropout(model: nn.Module) -> nn.Module:
    """Nothing random, so that two runs can be compared; layers that begin as zeros get small numbers, or nothing would be seen behind them."""
    for m in model.modules():
        for name, value in list(vars(m).items()):
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(m).__name__)):
                setattr(m, name, 0.0)
        config = getattr(m, "config", None)
        for name, value in list(getattr(config, "__dict__", {}).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(config, name, 0.0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and not p.abs().max():
                p.normal_(std=0.02)
    return model


# --- data ---

VOCABULARY = 99


def ids(n: int, length: int = 10) -> Tensor:
    return torch.randint(5, VOCABULARY, (n, length))


def padding(n: int, length: int = 10) -> Tensor:
    """1 for tokens: every sample has another length, one has all."""
    lengths = torch.randint(length // 2, length + 1, (n,))
    lengths[0] = length
    return (torch.arange(length) < lengths[:, None]).long()


def text(labels: str = "", mask: bool = True, **more: Callable[[int], Any]) -> Callable[[int], Data]:
    """Token ids, with a mask of the padding; `labels`: one class a "sample", one a "token" (padding ignored), "some" tokens' ids (masked words), "all"
    tokens' ids (a language model's), or the ends of a "span"."""

    def data(n: int) -> Data:
        found: dict[str, Any] = {"input_ids": ids(n)}
        here = padding(n)
        if mask:
            found["attention_mask"] = here
        if labels == "sample":
            found["labels"] = torch.randint(0, 5, (n,))
        elif labels == "token":
            found["labels"] = torch.randint(0, 5, (n, 10)).masked_fill(here == 0, -100)
        elif labels == "some":
            found["labels"] = torch.where(torch.rand(n, 10) < 0.3, found["input_ids"], -100)
            found["labels"][:, 0] = found["input_ids"][:, 0]
        elif labels == "all":
            found["labels"] = found["input_ids"].masked_fill(here == 0, -100) if mask else found["input_ids"].clone()
        elif labels == "span":
            found |= {"start_positions": torch.randint(0, 5, (n,)), "end_positions": torch.randint(5, 10, (n,))}
        return found | {k: v(n) for k, v in more.items()}

    return data


def image(size: int = 32, channels: int = 3) -> Callable[[int], Data]:
    return lambda n: (torch.randn(n, channels, size, size),)


def pixels(size: int = 32, labels: bool = True, **more: Callable[[int], Any]) -> Callable[[int], Data]:
    def data(n: int) -> Data:
        own = {"labels": torch.randint(0, 5, (n,))} if labels else {}
        return {"pixel_values": torch.randn(n, 3, size, size)} | own | {k: v(n) for k, v in more.items()}

    return data


def sequence(length: int = 8, width: int = 32) -> Callable[[int], Data]:
    return lambda n: (torch.randn(n, length, width),)


# --- Hugging Face: text ---

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def hf(cls: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        of = getattr(transformers, cls)
        return of(of.config_class(**config))

    return make


def add_hf(cls: str, data: Callable[[int], Data], variant: str = "", loss: bool = True, expected: str = "", **config: Any) -> None:
    add(f"{cls} {variant}".strip(), "transformers", hf(cls, **config), data, loss=loss, expected=expected)


class MeanPooled(nn.Module):
    """A sentence's embedding: the mean of its tokens', of length one."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def lora(cls: str, targets: list[str], task: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(hf(cls, **config)(), LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task))

    return make


def checkpointed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = make()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        return model

    return build


def choices(n: int) -> Data:
    return {"input_ids": ids(n * 3).view(n, 3, 10), "attention_mask": padding(n * 3).view(n, 3, 10), "labels": torch.randint(0, 3, (n,))}


five = {"num_labels": 5}
add_hf("BertForSequenceClassification", text("sample"), **TEXT, **five)
add_hf("BertForSequenceClassification", text("", mask=False), "logits, no mask", loss=False, **TEXT, **five)
add_hf("BertForSequenceClassification", text(), "logits", loss=False, **TEXT, **five)
add_hf("BertForSequenceClassification", text("sample"), "eager attention", **TEXT, **five, attn_implementation="eager")
add_hf("BertForMaskedLM", text("some"), **TEXT)
add_hf("BertForTokenClassification", text("token"), **TEXT, **five)
add_hf("BertForQuestionAnswering", text("span"), **TEXT)
add_hf("BertForMultipleChoice", choices, **TEXT)
add("BertModel, mean pooled", "transformers", lambda: MeanPooled(hf("BertModel", **TEXT)()), text())
add_hf("RobertaForSequenceClassification", text("sample"), **TEXT, **five)
add_hf("DistilBertForSequenceClassification", text("sample"), vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, **five)
add_hf("AlbertForSequenceClassification", text("sample"), embedding_size=16, **TEXT, **five)
add_hf(
    "DebertaV2ForSequenceClassification",
    text("sample"),
    **TEXT,
    **five,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    max_relative_positions=16,
)
add_hf("ElectraForSequenceClassification", text("sample"), embedding_size=16, **TEXT, **five)
add_hf("MPNetForSequenceClassification", text("sample"), **TEXT, **five)
add_hf("XLNetForSequenceClassification", text("sample"), vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64, **five)
add_hf("FNetForSequenceClassification", text("sample", mask=False), **TEXT, **five)
add_hf("RoFormerForSequenceClassification", text("sample"), **TEXT, **five, embedding_size=32)
add_hf("ModernBertForSequenceClassification", text("sample"), **DECODER, **five, local_attention=8, cls_token_id=1, sep_token_id=2)
add_hf("ConvBertForSequenceClassification", text("sample"), **TEXT, **five, embedding_size=32)
add_hf("SqueezeBertForSequenceClassification", text("sample"), **TEXT, **five, embedding_size=32)
add_hf("FunnelForSequenceClassification", text("sample"), vocab_size=VOCABULARY, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[1, 1], **five)
add_hf("BigBirdForSequenceClassification", text("sample"), **TEXT, **five, attention_type="original_full")
add_hf("LongformerForSequenceClassification", text("sample"), **TEXT, **five, attention_window=4)
add_hf("EsmForMaskedLM", text("some"), **TEXT, pad_token_id=0, mask_token_id=3)
add_hf("LayoutLMForTokenClassification", text("token", bbox=lambda n: torch.randint(0, 50, (n, 10, 2)).repeat(1, 1, 2).sort(-1).values), **TEXT, **five)

add_hf("GPT2LMHeadModel", text("all"), **GPT)
add_hf("GPT2LMHeadModel", text("all", mask=False), "no mask, no cache", **GPT, use_cache=False)
add_hf("GPT2LMHeadModel", text("", mask=False), "logits, no mask", loss=False, **GPT)
add_hf("GPT2ForSequenceClassification", text("sample"), **GPT, **five, pad_token_id=0)
add_hf(
    "GPTNeoForCausalLM",
    text("all"),
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_layers=2,
    attention_types=[[["global", "local"], 1]],
    num_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    window_size=4,
)
add_hf("GPTNeoXForCausalLM", text("all"), **TEXT)
add_hf("GPTJForCausalLM", text("all"), **GPT, rotary_dim=4)
add_hf("OPTForCausalLM", text("all"), **TEXT, ffn_dim=64, word_embed_proj_dim=32)
add_hf("BloomForCausalLM", text("all"), vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
add_hf("LlamaForCausalLM", text("all"), **DECODER)
add_hf("LlamaForCausalLM", text("all", mask=False), "no mask, no cache", **DECODER, use_cache=False)
add_hf("LlamaForCausalLM", text(), "logits", loss=False, **DECODER)
add_hf("LlamaForSequenceClassification", text("sample"), **DECODER, **five)
add("LlamaForCausalLM checkpointed", "transformers", checkpointed(hf("LlamaForCausalLM", **DECODER, use_cache=False)), text("all"), loss=True)
add_hf("MistralForCausalLM", text("all"), **DECODER, sliding_window=6)
add_hf("Qwen2ForCausalLM", text("all"), **DECODER)
add_hf("Qwen3ForCausalLM", text("all"), **DECODER, head_dim=8)
add_hf("GemmaForCausalLM", text("all"), **DECODER, head_dim=8)
add_hf("Gemma2ForCausalLM", text("all"), **DECODER, head_dim=8)
add_hf("PhiForCausalLM", text("all"), **DECODER)
add_hf("Phi3ForCausalLM", text("all"), **DECODER)
add_hf("FalconForCausalLM", text("all"), vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
add_hf("MixtralForCausalLM", text("all"), **DECODER, num_local_experts=4)
add_hf("MambaForCausalLM", text("all", mask=False), vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)

SPEECH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}


def speech(labels: Callable[[int], Tensor]) -> Callable[[int], Data]:
    return lambda n: {"input_values": torch.randn(n, 200), "labels": labels(n)}


def seq2seq(n: int) -> Data:
    return {"input_ids": ids(n), "attention_mask": padding(n), "labels": ids(n, 6)}


BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
add_hf("T5ForConditionalGeneration", seq2seq, vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
add_hf("BartForConditionalGeneration", seq2seq, **BART, max_position_embeddings=64)
add_hf("PegasusForConditionalGeneration", seq2seq, **BART, max_position_embeddings=64)
add_hf("MarianMTModel", seq2seq, **BART, max_position_embeddings=64)
add_hf(
    "WhisperForConditionalGeneration",
    lambda n: {"input_features": torch.randn(n, 16, 40), "labels": ids(n, 6)},
    **BART,
    num_mel_bins=16,
    max_source_positions=20,
    max_target_positions=16,
    begin_suppress_tokens=None,
)
add_hf("Wav2Vec2ForCTC", speech(lambda n: torch.randint(1, 20, (n, 4))), **SPEECH, vocab_size=20, expected="")
add_hf("Wav2Vec2ForSequenceClassification", speech(lambda n: torch.randint(0, 5, (n,))), **SPEECH, **five, classifier_proj_size=16)
add_hf("HubertForSequenceClassification", speech(lambda n: torch.randint(0, 5, (n,))), **SPEECH, **five, classifier_proj_size=16)
add_hf(
    "ASTForAudioClassification",
    lambda n: {"input_values": torch.randn(n, 32, 16), "labels": torch.randint(0, 5, (n,))},
    **TEXT,
    **five,
    max_length=32,
    num_mel_bins=16,
    patch_size=8,
    frequency_stride=8,
    time_stride=8,
)
add_hf(
    "PatchTSTForPrediction",
    lambda n: {"past_values": torch.randn(n, 32, 3), "future_values": torch.randn(n, 8, 3)},
    num_input_channels=3,
    context_length=32,
    patch_length=8,
    patch_stride=8,
    prediction_length=8,
    d_model=32,
    num_attention_heads=4,
    num_hidden_layers=2,
    ffn_dim=64,
)

# --- Hugging Face: images ---

VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
TOWERS = {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": VISION}
add_hf("CLIPModel", text(pixel_values=lambda n: torch.randn(n, 3, 32, 32), return_loss=lambda n: True), **TOWERS, projection_dim=16)
add_hf("SiglipModel", text("", mask=False, pixel_values=lambda n: torch.randn(n, 3, 32, 32), return_loss=lambda n: True), **TOWERS)
add_hf("ViTForImageClassification", pixels(), **VISION, **five)
add_hf("ViTForImageClassification", pixels(labels=False), "logits", loss=False, **VISION, **five)
add_hf("DeiTForImageClassification", pixels(), **VISION, **five)
add_hf("BeitForImageClassification", pixels(), **VISION, **five)
add_hf("Dinov2ForImageClassification", pixels(), **VISION, **five)
add_hf(
    "ViTMAEForPreTraining",
    pixels(labels=False, noise=lambda n: torch.rand(n, 16)),  # which patches are masked: else every run draws its own
    **VISION,
    decoder_hidden_size=32,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=64,
)
add_hf("SwinForImageClassification", pixels(), image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **five)
add_hf("Swinv2ForImageClassification", pixels(), image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **five)
add_hf("ConvNextForImageClassification", pixels(), hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], **five)
add_hf("ConvNextV2ForImageClassification", pixels(), hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 2, 1], **five)
BATCH_NORM = "batch normalisation ties the samples together"
add_hf(
    "ResNetForImageClassification",
    pixels(),
    embedding_size=16,
    hidden_sizes=[16, 24, 32, 40],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    **five,
    expected=BATCH_NORM,
)
SEGFORMER = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 4], "decoder_hidden_size": 32}
add_hf("SegformerForImageClassification", pixels(64), **SEGFORMER, **five)
add_hf(
    "SegformerForSemanticSegmentation",
    lambda n: {"pixel_values": torch.randn(n, 3, 64, 64), "labels": torch.randint(0, 5, (n, 64, 64))},
    **SEGFORMER,
    **five,
    expected=f"{BATCH_NORM} in front of the head",
)
add_hf(
    "MobileViTForImageClassification",
    pixels(),
    image_size=32,
    hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[8, 16, 16, 24, 24, 32, 64],
    **five,
    expected=BATCH_NORM,
)
add_hf("PvtForImageClassification", pixels(64), image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 4], **five)
add_hf(
    "VideoMAEForVideoClassification",
    lambda n: {"pixel_values": torch.randn(n, 4, 3, 16, 16), "labels": torch.randint(0, 5, (n,))},
    **(VISION | {"image_size": 16}),
    num_frames=4,
    **five,
)
add("LlamaForCausalLM, LoRA", "peft", lora("LlamaForCausalLM", ["q_proj", "v_proj"], "CAUSAL_LM", **DECODER), text("all"), loss=True)
add(
    "BertForSequenceClassification, LoRA",
    "peft",
    lora("BertForSequenceClassification", ["query", "value"], "SEQ_CLS", **TEXT, **five),
    text("sample"),
    loss=True,
)


# --- timm ---


def add_timm(name: str, size: int = 32, expected: str = "", cls: str = "", parts: dict[str, str] | None = None, **more: Any) -> None:
    """`cls`: the class in its module, for the models whose own function leaves no choice of sizes; `parts`: arguments that are named in that module."""

    def make() -> nn.Module:
        import importlib

        import timm

        if not cls:
            return timm.create_model(name, num_classes=7, **more)
        module = importlib.import_module(f"timm.models.{cls.split('.')[0]}")
        return getattr(module, cls.split(".")[1])(num_classes=7, **more, **{k: getattr(module, v) for k, v in (parts or {}).items()})

    add(f"timm {name}", "timm", make, image(size), expected=expected)


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
add_timm("vit_tiny_patch16_224", **VIT)
add_timm("deit_tiny_patch16_224", **VIT)
add_timm("deit_tiny_distilled_patch16_224", **VIT)
add_timm("deit3_small_patch16_224", **VIT)
add_timm("beit_base_patch16_224", **VIT)
add_timm("eva02_tiny_patch14_224", **VIT)
add_timm("vit_relpos_base_patch16_224", **VIT)
add_timm("convit_tiny", **(VIT | {"num_heads": 4}), local_up_to_layer=1)
add_timm("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
add_timm("swinv2_tiny_window8_256", img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
add_timm("convnext_tiny", dims=(16, 24, 32, 40), depths=(1, 1, 2, 1))
add_timm("convnextv2_atto", dims=(16, 24, 32, 40), depths=(1, 1, 2, 1))
MIXER = {"cls": "mlp_mixer.MlpMixer", "img_size": 32, "patch_size": 8, "embed_dim": 48, "num_blocks": 2}
add_timm("mixer_s16_224", **MIXER)
add_timm("resmlp_12_224", **MIXER, mlp_ratio=4, parts={"block_layer": "ResBlock", "norm_layer": "Affine"})
add_timm("gmlp_ti16_224", **MIXER, mlp_ratio=6, parts={"block_layer": "SpatialGatingBlock", "mlp_layer": "GatedMlp"})
add_timm("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4)
add_timm("xcit_nano_12_p8_224", img_size=32, embed_dim=48, depth=2, num_heads=4, expected=f"{BATCH_NORM} in its local patch interaction")
add_timm("pit_ti_224", img_size=32, patch_size=8, stride=4, base_dims=(16, 16), depth=(1, 1), heads=(2, 4))
add_timm("coat_lite_tiny", img_size=64, size=64, embed_dims=(16, 32, 32, 64), serial_depths=(1, 1, 1, 1))
add_timm("coatnet_nano_rw_224", size=64, img_size=64, expected=BATCH_NORM)
add_timm("maxvit_pico_rw_256", size=64, img_size=64, expected=BATCH_NORM)
add_timm("twins_svt_small", size=64, img_size=64, embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 4, 4), depths=(1, 2, 2, 1), wss=(4, 4, 4, 4))
add_timm("twins_pcpvt_small", size=64, img_size=64, embed_dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 4), depths=(1, 1, 1, 1))
FORMER = {"cls": "metaformer.MetaFormer", "depths": (1, 1, 1, 1), "dims": (16, 24, 32, 64)}
add_timm(
    "poolformer_s12",
    **FORMER,
    downsample_norm=None,
    mlp_act=nn.GELU,
    mlp_bias=True,
    res_scale_init_values=None,
    use_mlp_head=False,
    parts={"norm_layers": "GroupNorm1"},
)
add_timm("convformer_s18", **FORMER, parts={"token_mixers": "SepConv", "norm_layers": "LayerNorm2dNoBias"})
add_timm("focalnet_tiny_srf", cls="focalnet.FocalNet", embed_dim=16, depths=(1, 1, 1, 1))
add_timm("davit_tiny", size=64, depths=(1, 1, 1, 1), embed_dims=(16, 24, 32, 40), num_heads=(2, 2, 2, 2), window_size=4)
add_timm("edgenext_xx_small", size=64)
add_timm("pvt_v2_b0", size=64, embed_dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 4), depths=(1, 1, 1, 1))
add_timm("mvitv2_tiny", size=64, img_size=64)
add_timm("nest_tiny", cls="nest.Nest", img_size=32, patch_size=2, num_levels=3, embed_dims=(16, 24, 32), num_heads=(2, 2, 4), depths=(1, 1, 2))
add_timm("hiera_tiny_224", size=64, img_size=(64, 64), embed_dim=24, stages=(1, 1, 2, 1))
add_timm("crossvit_tiny_240", size=48, img_size=48, img_scale=(1.0, 1.0), patch_size=(12, 16), embed_dim=(16, 32), depth=((1, 2, 0),), num_heads=(2, 2))
add_timm("volo_d1_224", cls="volo.VOLO", size=64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(32, 48, 48, 48), num_heads=(2, 3, 3, 3))
add_timm("sequencer2d_s", layers=(1, 1, 1, 1), embed_dims=(32, 32, 32, 32), hidden_sizes=(8, 8, 8, 8))
add_timm("samvit_base_patch16", size=32, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, window_size=2, global_attn_indexes=(1,), neck_chans=16)
add_timm("inception_next_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40), expected=BATCH_NORM)
add_timm("mambaout_femto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 40))
add_timm("nfnet_l0", size=64, expected="")
add_timm("resnetv2_50x1_bit", cls="resnetv2.ResNetV2", layers=[1, 1, 1, 1], channels=(128, 128, 128, 128), stem_type="fixed", stem_chs=32)
add_timm("efficientnet_b0_g8_gn", size=64)
VGG = {"cls": "vgg.VGG", "cfg": [16, "M", 32, "M", 32, 32, "M", 32, 32, "M", 32, 32, "M"], "mlp_ratio": 0.02}
add_timm("vgg11", size=64, **VGG)
NORMALISED: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "regnety_002": {},
    "ghostnet_050": {},
    "densenet121": {"growth_rate": 8, "block_config": (1, 1, 1, 1)},
    "levit_128s": {"img_size": 64, "depth": (1, 1, 1)},
    "visformer_tiny": {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 2},
    "convmixer_768_32": {"cls": "convmixer.ConvMixer", "dim": 32, "depth": 2},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4), "window_sizes": (4, 4, 4, 2)},
    "vgg11_bn": VGG | {"norm_layer": nn.BatchNorm2d},
}
for name, sizes in NORMALISED.items():
    add_timm(name, size=64, expected=BATCH_NORM, **sizes)


# --- diffusion, graphs, tables, and smaller libraries ---


def diffusion(cls: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, cls)(**config)

    return make


UNET = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
add(
    "UNet2DModel",
    "diffusers",
    diffusion("UNet2DModel", **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8),
    lambda n: (torch.randn(n, 3, 16, 16), torch.randint(0, 1000, (n,))),
)
add(
    "UNet2DConditionModel",
    "diffusers",
    diffusion(
        "UNet2DConditionModel",
        **UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    ),
    lambda n: (torch.randn(n, 4, 16, 16), torch.randint(0, 1000, (n,)), torch.randn(n, 5, 24)),
)
add(
    "DiTTransformer2DModel",
    "diffusers",
    diffusion(
        "DiTTransformer2DModel",
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ),
    lambda n: {"hidden_states": torch.randn(n, 4, 8, 8), "timestep": torch.randint(0, 1000, (n,)), "class_labels": torch.randint(0, 10, (n,))},
)
add(
    "AutoencoderKL",
    "diffusers",
    diffusion(
        "AutoencoderKL",
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ),
    image(16),
)


class Graphs(nn.Module):
    """A classifier of graphs of one size, as dense adjacency matrices."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 5)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x, adj))
        return self.head(x.mean(1))


class Nodes(nn.Module):
    """A classifier of the nodes of one graph given by its edges: the nodes are the samples, and tied to each other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x, edge_index))
        return x


def dense(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torch_geometric.nn as g

        of = getattr(g, kind)
        return Graphs([of(16, 32), of(32, 32)] if kind != "DenseGINConv" else [of(nn.Linear(16, 32)), of(nn.Linear(32, 32))], 32)

    return make


def graph_data(n: int) -> Data:
    return torch.randn(n, 6, 16), (torch.rand(n, 6, 6) < 0.4).to(torch.get_default_dtype())


def sparse(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torch_geometric.nn as g

        return Nodes([getattr(g, kind)(16, 32), getattr(g, kind)(32, 5)])

    return make


for kind in ("DenseGCNConv", "DenseGATConv", "DenseSAGEConv", "DenseGINConv"):
    add(f"PyG {kind}", "torch_geometric", dense(kind), graph_data)
add(
    "PyG GCNConv",
    "torch_geometric",
    sparse("GCNConv"),
    lambda n: (torch.randn(n, 16), torch.randint(0, n, (2, 3 * n))),
    expected="the nodes of one graph are tied by its edges",
)


def tabular(cls: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import rtdl_revisiting_models as r

        if cls == "FTTransformer":
            return r.FTTransformer(
                n_cont_features=6,
                cat_cardinalities=[4, 7],
                d_out=3,
                n_blocks=2,
                d_block=32,
                attention_n_heads=4,
                attention_dropout=0.1,
                ffn_d_hidden_multiplier=2.0,
                ffn_dropout=0.1,
                residual_dropout=0.0,
            )
        if cls == "ResNet":
            return r.ResNet(d_in=16, d_out=3, n_blocks=2, d_block=32, d_hidden=64, d_hidden_multiplier=None, dropout1=0.1, dropout2=0.0)
        return r.MLP(d_in=16, d_out=3, n_blocks=3, d_block=32, dropout=0.1)

    return make


add("rtdl FTTransformer", "rtdl_revisiting_models", tabular("FTTransformer"), lambda n: (torch.randn(n, 6), torch.randint(0, 4, (n, 2))))
add("rtdl MLP", "rtdl_revisiting_models", tabular("MLP"), lambda n: (torch.randn(n, 16),))
add("rtdl ResNet", "rtdl_revisiting_models", tabular("ResNet"), lambda n: (torch.randn(n, 16),), expected=BATCH_NORM)


def tabnet() -> nn.Module:
    from pytorch_tabnet.tab_network import TabNet

    return TabNet(16, 3, n_d=8, n_a=8, n_steps=2, virtual_batch_size=4, group_attention_matrix=torch.eye(16))


add("TabNet", "pytorch_tabnet", tabnet, lambda n: (torch.randn(n, 16),), expected=f"{BATCH_NORM} (of virtual batches)")


def vit_pytorch(cls: str, module: str = "", **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import importlib

        return getattr(importlib.import_module(f"vit_pytorch.{module}" if module else "vit_pytorch"), cls)(**config)

    return make


LUCID = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
add("vit-pytorch ViT", "vit_pytorch", vit_pytorch("ViT", **LUCID), image())
add("vit-pytorch SimpleViT", "vit_pytorch", vit_pytorch("SimpleViT", **LUCID), image())
add("vit-pytorch DeepViT", "vit_pytorch", vit_pytorch("DeepViT", "deepvit", **LUCID), image())
add(
    "vit-pytorch T2TViT",
    "vit_pytorch",
    vit_pytorch("T2TViT", "t2t", image_size=32, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=64, t2t_layers=((7, 4), (3, 2))),
    image(),
)


def x_transformer(**attention: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from x_transformers import Decoder, TransformerWrapper

        return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=Decoder(dim=32, depth=2, heads=4, **attention))

    return make


add("x-transformers decoder", "x_transformers", x_transformer(rotary_pos_emb=True), lambda n: (ids(n),))
add("x-transformers decoder, ALiBi", "x_transformers", x_transformer(alibi_pos_bias=True, ff_glu=True), lambda n: (ids(n),))


def segmentation(cls: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, cls)(encoder_name=encoder, encoder_weights=None, classes=3)

    return make


add("smp Unet resnet18", "segmentation_models_pytorch", segmentation("Unet", "resnet18"), image(32), expected=BATCH_NORM)
add("smp Segformer mit_b0", "segmentation_models_pytorch", segmentation("Segformer", "mit_b0"), image(64), expected=f"{BATCH_NORM} in front of the head")


# --- torch.nn ---


class Recurrent(nn.Module):
    def __init__(self, cell: str, **more: Any) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(VOCABULARY, 24), getattr(nn, cell)(24, 32, batch_first=True, **more)
        self.head = nn.Linear(32 * (2 if more.get("bidirectional") else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.body(self.table(x))
        return self.head(hidden[:, -1])


class Attention(nn.Module):
    """Self-attention over time, which is axis 0 unless `batch_first`."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention, self.norm, self.head = nn.MultiheadAttention(32, 4, batch_first=batch_first), nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.attention(x, x, x)
        return self.head(self.norm(x + found))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.body(self.table(input_ids), src_key_padding_mask=attention_mask == 0)[:, 0])


def encoder(**more: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **more), 2)


add("nn.TransformerEncoder", "torch", lambda: encoder(batch_first=True), sequence())
add(
    "nn.TransformerEncoder, norm first, causal",
    "torch",
    lambda: encoder(batch_first=True, norm_first=True),
    lambda n: (torch.randn(n, 8, 32), nn.Transformer.generate_square_subsequent_mask(8)),
)
add("nn.TransformerEncoder, time first", "torch", encoder, lambda n: (torch.randn(8, n, 32),), axis=1)
add("nn.TransformerEncoder, padding mask", "torch", Padded, text())
add("nn.Transformer", "torch", lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True), lambda n: (torch.randn(n, 8, 32), torch.randn(n, 6, 32)))
add("nn.LSTM", "torch", lambda: Recurrent("LSTM"), lambda n: (ids(n),))
add("nn.LSTM, two layers, both ways", "torch", lambda: Recurrent("LSTM", num_layers=2, bidirectional=True), lambda n: (ids(n),))
add("nn.GRU", "torch", lambda: Recurrent("GRU"), lambda n: (ids(n),))
add("nn.MultiheadAttention", "torch", lambda: Attention(True), sequence())
add("nn.MultiheadAttention, time first", "torch", lambda: Attention(False), lambda n: (torch.randn(8, n, 32),), axis=1)


# --- several rows for each sample ---


def images() -> nn.Sequential:
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32))


class Video(nn.Module):
    """A network of images on all frames, attention over time, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.time, self.head = images(), nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.time(self.frames(x.flatten(0, 1)).unflatten(0, x.shape[:2])).mean(1))


class Contrastive(nn.Module):
    """Two views at once, and NT-Xent as the loss (SimCLR)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.projection = images(), nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        z = F.normalize(self.projection(self.encoder(torch.cat([a, b]))))
        n = len(a)
        other = torch.cat([torch.arange(n, 2 * n), torch.arange(n)])
        return F.cross_entropy(z @ z.t() / 0.5 - 1e9 * torch.eye(2 * n), other)


class Siamese(nn.Module):
    """One encoder, called for each view; the distance of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = images(), nn.Linear(32, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.encoder(a) - self.encoder(b)).abs())


def two_views(n: int) -> Data:
    return torch.randn(n, 3, 12, 12), torch.randn(n, 3, 12, 12)


COMPARED = "the loss compares all samples; rows begin below it"
add("frames of clips", "torch", Video, lambda n: (torch.randn(n, 4, 3, 12, 12),))
add("SimCLR, loss inside", "torch", Contrastive, two_views, loss=True, expected=COMPARED)
add("siamese network", "torch", Siamese, two_views)


def named(patterns: list[str]) -> Iterator[Model]:
    """The models whose names contain one of the patterns, in the table's order; all without patterns."""
    for name, model in MODELS.items():
        if not patterns or any(p == name or (p not in MODELS and p.lower() in name.lower()) for p in patterns):
            yield model
