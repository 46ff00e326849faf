"""Tiny random models of every supported architecture, with a tokenizer, for tests; no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from exporters.model.spec import ModelSpec
from runtime_py.bundle import manifest
from toolchain.compile.adapter_layout import layout

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
WINDOW = 8  # tokens, fewer than any test's text
CONTEXT = 48  # tokens of the programs
# The MLP is wide, so that attention's small matrices keep their usual share of the arithmetic.
SIZES: dict = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TWO_KINDS = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _TWO_KINDS},
    "qwen3": {"head_dim": 24},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": _TWO_KINDS,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": _TWO_KINDS,
    },
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": WINDOW},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
}


def every_target(kind: str) -> list[str]:
    """All modules that LoRA can adapt, as the architecture's checkpoints name them."""
    if kind == "phi3":
        return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    names = ("q", "k", "v", "o", "gate", "up", "down")
    return [f"{name}_proj" for name in names]


def config_of(kind: str, **changes: object) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **(SIZES | ARCHITECTURES[kind] | changes))


def hugging_face(kind: str, **changes: object) -> PreTrainedModel:
    """The architecture's own module with random weights: every norm and bias differs from 1 and 0,
    and scores are large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of(kind, **changes), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    return model


def tokens_of(count: int, seed: int = 1, vocab: int = SIZES["vocab_size"]) -> Tensor:
    """Random ordinary tokens [1, count]."""
    return torch.randint(3, vocab, (1, count), generator=torch.Generator().manual_seed(seed))


def adapted(
    model: PreTrainedModel, targets: Sequence[str], rank: int = 4, seed: int = 0, **options: object
) -> PeftModel:
    """PEFT's own LoRA around ``model`` (changed in place), with an A and a B that are not zero."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=6, target_modules=list(targets), **options
    )
    peft = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return peft


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a part of the largest value expected."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def bpe(vocabulary: int) -> Tokenizer:
    """Byte-level BPE: <pad>, <s>, </s>, the 256 bytes, and merges learned from one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "the cat sat on the mat and the hat of the cats that sat there then another other mother"
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def tokenizer_of(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe(vocabulary), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def save_checkpoint(folder: Path, kind: str = "llama", **changes: object) -> Path:
    """A Hugging Face folder: config, safetensors, tokenizer and chat template."""
    model = hugging_face(kind, **({"vocab_size": 320} | changes))
    model.save_pretrained(folder)
    tokenizer_of(model.config.vocab_size).save_pretrained(folder)
    return folder


# <s>user: …</s>, <s>assistant: …</s>, a line each, with the ids of ``bpe``.
_OPENED = (2, "\n", 1, "assistant: ")
CHAT = manifest.ChatPieces(
    begin=(1, "user: "),
    answer=_OPENED,
    ask=(2, "\n", 1, "user: "),
    last_answer=_OPENED,
    end=(2, "\n"),
    reply=_OPENED,
    unanswered=(2, "\n"),
)


def paper_bundle(folder: Path, spec: ModelSpec, targets: Sequence[str], rank: int) -> Path:
    """A bundle of stand-in files around a true manifest: for what only looks at the manifest."""
    for name, content in {
        "adapter/adapter_config.json": b"{}",
        "adapter/adapter_model.safetensors": bytes(range(40)),
        "android/adapter.ptd": bytes(64),
        "android/lm.pte": b"ET12" * 20,
        "config.json": b"{}\n",
        "tokenizer.json": b"{}\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    number = manifest.Tensor(name="logits", shape=(1, spec.vocab), dtype="float32")
    words = manifest.Tensor(name="tokens", shape=(1, "1..16"), dtype="int64")
    program = manifest.Program(
        name="forward", file="android/lm.pte", inputs=(words,), outputs=(number,), bytes=80
    )
    manifest.write_manifest(
        folder,
        manifest.Manifest(
            attune="0",
            versions={"torch": "2"},
            model=manifest.Model(
                name="paper",
                source="a test",
                architecture=spec.architecture,
                parameters=1,
                vocab=spec.vocab,
                hidden=spec.hidden,
                layers=len(spec.layers),
                heads=spec.heads,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                intermediate=spec.intermediate,
                context=spec.context,
                config="config.json",
            ),
            tokenizer=manifest.Tokenizer(
                file="tokenizer.json", bos_id=1, eos_ids=(2,), pad_id=None, chat=CHAT
            ),
            adapter=manifest.Adapter(
                rank=rank,
                alpha=2.0,
                targets=tuple(targets),
                peft="adapter",
                runtime="android/adapter.ptd",
                tensors=layout(spec, targets, rank),
            ),
            policy=manifest.Policy(),
            android=manifest.PlatformTarget(quantize="none", chosen_by="user", programs=(program,)),
            files=manifest.list_files(folder),
        ),
    )
    return folder
