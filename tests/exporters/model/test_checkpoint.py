"""Checkpoints against transformers itself, with tiny random models made here; no network."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from exporters.errors import ExportError
from exporters.model.assembly import build
from exporters.model.checkpoint import Checkpoint, load_checkpoint
from exporters.model.spec import read_spec
from tests import tiny
from toolchain.compile.tolerances import model_terms, rounding

SHARED = Path(__file__).parents[4] / "shared" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
TEXT = "The cat sat; 12 cats' hats, naïve — 2024!\n\n  <s>ok</s> 🐈"
SIZES: dict = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict = {"head_dim": 256, "num_attention_heads": 1, "num_key_value_heads": 1}
CASES: dict[str, dict] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},  # transformers does not read another one from GGUF
    "phi3": {"tie_word_embeddings": False, "sliding_window": 16},
    "gemma2": GEMMA | {"sliding_window": 16},
    "gemma3_text": GEMMA | {"sliding_window": 16},
    "smollm3": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
}


def backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = "the cat sat on the mat and the hat of the cats that sat there then another other mother"
    tokenizer.train_from_iterator([text] * 3, trainer)
    return tokenizer


def tokenizer_of() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def model_of(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | CASES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


def ours(checkpoint: Checkpoint) -> torch.Tensor:
    return logits(build(read_spec(checkpoint.config), checkpoint.state))


def bound_of(checkpoint: Checkpoint) -> float:
    """How far ``ours`` may be from Hugging Face's, as a part of the largest logit."""
    return rounding(model_terms(read_spec(checkpoint.config), 40))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "model", model_of("llama"))


def written(folder: Path, model: PreTrainedModel, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    tokenizer_of().save_pretrained(folder)
    return folder


def refused(model: Path | str, words: str, template: Path | None = None) -> None:
    with pytest.raises(ExportError, match=words) as caught:
        load_checkpoint(str(model), chat_template=template)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Folders


@pytest.mark.parametrize("model_type", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_is_what_transformers_reads(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    folder = written(tmp_path / "m", model_of(model_type).to(dtype))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    checkpoint = load_checkpoint(str(folder))
    expected = theirs.state_dict()
    assert checkpoint.state.keys() >= expected.keys() - {"lm_head.weight"}
    for name in checkpoint.state:
        assert checkpoint.state[name].dtype == dtype
        assert torch.equal(checkpoint.state[name].float(), expected[name])
    own, read = checkpoint.config.to_dict(), AutoConfig.from_pretrained(folder).to_dict()
    assert own | {"_name_or_path": ""} == read | {"_name_or_path": ""}
    assert checkpoint.config._attn_implementation == "eager"
    model = checkpoint.hf_model()
    assert model.dtype == torch.float32
    assert not model.training
    assert torch.equal(logits(model), logits(theirs))
    assert tiny.relative(ours(checkpoint), logits(theirs)) <= bound_of(checkpoint)


def test_shards_are_one_model(tmp_path: Path) -> None:
    model = model_of("llama")
    folder = written(tmp_path / "m", model, max_shard_size="60KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    checkpoint = load_checkpoint(str(folder))
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(checkpoint.state[name], tensor)
    assert checkpoint.source.count("sha256:") == len(shards)
    assert all(s.name in checkpoint.source for s in shards)

    shards[1].rename(folder / "aside")
    refused(folder, f"lacks 1 of {len(shards)} weight shards")
    (folder / "aside").rename(shards[1])
    save_file({"x": torch.zeros(1)}, shards[1])
    refused(folder, "tensors that no shard has")
    index = folder / "model.safetensors.index.json"
    edit(index, weight_map={"a": "../../x.safetensors"})
    refused(folder, "expected safetensors files in the same folder")
    edit(index, weight_map=3)
    refused(folder, "no 'weight_map'")
    index.unlink()
    refused(folder, r"safetensors files and no model\.safetensors\.index\.json")


def test_tokenizer_is_the_one_of_the_file(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.chat_template == TEMPLATE
    assert checkpoint.tokenizer.encode(TEXT) == AutoTokenizer.from_pretrained(folder).encode(TEXT)
    checkpoint.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    phone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (
        phone.encode(TEXT).ids
        == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    )


def test_all_ends_of_a_reply_are_known(folder: Path) -> None:
    """The tokenizer's own is the first, though others have lower ids or stand before it."""
    edit(folder / "generation_config.json", eos_token_id=[7, 0, 2])
    assert load_checkpoint(str(folder)).eos_ids == (2, 7, 0)


@pytest.mark.parametrize("ids", [-1, 320, [2, 9999], "</s>", 2.0, True, [[2]]])
def test_an_end_that_no_token_is_is_refused(folder: Path, ids: object) -> None:
    edit(folder / "generation_config.json", eos_token_id=ids)
    refused(folder, "generation_config.json names .* expected ids from 0 to 319")


def test_a_model_without_an_end_is_refused(folder: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        edit(folder / name, eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    refused(folder, "names no token that ends a reply")


def test_templates_without_a_default_are_listed(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": name, "template": TEMPLATE} for name in ("tool_use", "rag")]
    edit(folder / "tokenizer_config.json", chat_template=named)
    refused(folder, "has the chat templates rag, tool_use and no default")


def test_source_names_the_file_and_its_hash(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    expected = f"model (safetensors): model.safetensors sha256:{digest}"
    assert load_checkpoint(str(folder)).source == expected


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_gemma3_gives_its_text_model(tmp_path: Path, prefix: str) -> None:
    model = model_of("gemma3_text")
    folder = written(tmp_path / "m", model)
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    other = "" if prefix.startswith("language") else "model."
    state |= {
        f"{other}vision_tower.x": torch.ones(2),
        f"{other}multi_modal_projector.y": torch.ones(2),
    }
    save_file(state, folder / "model.safetensors")
    checkpoint = load_checkpoint(str(folder))
    assert checkpoint.config.model_type == "gemma3_text"
    assert torch.equal(logits(checkpoint.hf_model()), logits(model))


def test_folders_that_are_not_whole_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    (tmp_path / "empty" / "m.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "empty", r"GGUF files \(m.gguf\)")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", "PEFT adapter, not a model")

    (folder / "tokenizer.json").rename(tmp_path / "t")
    refused(folder, "no tokenizer.json")
    for text in ('{"model": 3}', '{"model": {"type": "BPE"}}'):
        (folder / "tokenizer.json").write_text(text)
        refused(folder, "cannot be read as a tokenizer")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer.json is not valid JSON")
    (tmp_path / "t").rename(folder / "tokenizer.json")

    config = folder / "tokenizer_config.json"
    good = config.read_text()
    config.write_text("[1]")
    refused(folder, "tokenizer_config.json holds a list")
    edit_to = json.loads(good) | {"bos_token": 3}
    config.write_text(json.dumps(edit_to))
    refused(folder, "tokenizer_config.json does not fit")
    config.write_text(good)

    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, r"only as pickles \(pytorch_model.bin\)")
    refused(folder / "pytorch_model.bin", "pickled weights are never read")


def test_broken_safetensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "model.safetensors is truncated or corrupt")
    path.write_bytes(b"\xff" * 200)
    refused(folder, "model.safetensors is truncated or corrupt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"3", "holds a int"),
        (b"\xff\xff", "not UTF-8"),
        (b"{}", "architecture 'None' is not supported; supported: llama"),
        (b'{"model_type": "gpt2"}', "architecture 'gpt2' is not supported"),
    ],
)
def test_config_is_checked_before_the_weights(folder: Path, content: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes(b"never read")
    refused(folder, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "wide"}, "config.json has a value that cannot be used"),
        ({"intermediate_size": -96}, "intermediate_size is -96; expected a positive integer"),
        ({"num_attention_heads": 5}, "config.json has a value that cannot be used"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
    ],
)
def test_a_config_that_cannot_be_is_refused(folder: Path, changes: dict, words: str) -> None:
    edit(folder / "config.json", **changes)
    refused(folder, words)


def test_weights_in_other_formats_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(state, folder / "model.safetensors")
    refused(folder, "model.norm.weight in .* is stored as F8_E4M3")


def test_two_different_heads_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    load_checkpoint(str(folder))
    state["lm_head.weight"] += 1
    save_file(state, folder / "model.safetensors")
    refused(folder, "tie_word_embeddings")


def test_a_head_that_is_also_the_table_is_stored_once(folder: Path) -> None:
    """Under either name."""
    edit(folder / "config.json", tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    state.pop("lm_head.weight", None)
    save_file(state, folder / "model.safetensors")
    expected = logits(load_checkpoint(str(folder)).hf_model())
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors")
    assert torch.equal(logits(load_checkpoint(str(folder)).hf_model()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"]
)
def test_stored_rotary_frequencies(folder: Path, dtype: torch.dtype, name: str) -> None:
    """As old checkpoints have them: those of the config are left out, others are refused."""
    expected = logits(load_checkpoint(str(folder)).hf_model())
    config = AutoConfig.from_pretrained(folder)
    size = config.head_dim
    theta = config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    state = load_file(folder / "model.safetensors")
    state[name] = frequencies.to(dtype)
    save_file(state, folder / "model.safetensors")
    checkpoint = load_checkpoint(str(folder))
    assert name not in checkpoint.state
    assert torch.equal(logits(checkpoint.hf_model()), expected)
    state[name] = (frequencies**1.1).to(dtype)
    save_file(state, folder / "model.safetensors")
    refused(folder, f"1 stored rotary frequencies are not those of config.json: {name} is")


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_git_lfs_pointer_is_called_so(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    refused(folder, f"{name} is a Git LFS pointer.* run 'git lfs pull'")


def test_other_git_lfs_pointers(folder: Path, tmp_path: Path) -> None:
    for name in ("m.gguf", "chat.jinja"):
        (tmp_path / name).write_text(POINTER)
    refused(tmp_path / "m.gguf", "m.gguf is a Git LFS pointer")
    refused(folder, "chat.jinja is a Git LFS pointer", tmp_path / "chat.jinja")


def test_hf_model_lists_every_misfit(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    state["model.extra.weight"] = torch.zeros(2)
    state["model.layers.0.input_layernorm.weight"] = torch.zeros(3)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ExportError) as caught:
        load_checkpoint(str(folder)).hf_model()
    message = str(caught.value)
    assert "(3)" in message
    assert "model.norm.weight is missing" in message
    assert "model.extra.weight is not part of it" in message
    assert "model.layers.0.input_layernorm.weight is [3], expected [64]" in message


# Chat templates


def test_a_given_template_is_used(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "chat.jinja"
    given.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    checkpoint = load_checkpoint(str(folder), chat_template=given)
    assert checkpoint.chat_template == given.read_text()
    turn = [{"role": "user", "content": "hi"}]
    assert checkpoint.tokenizer.apply_chat_template(turn, tokenize=False) == "[hi]"


def test_a_template_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    given = tmp_path / "chat.jinja"
    refused(folder, "cannot be read: No such file", given)
    given.write_text("")
    refused(folder, "no chat template", given)
    given.write_bytes(b"\xff")
    refused(folder, "not UTF-8", given)
    (folder / "chat_template.jinja").unlink()
    refused(folder, "no chat template; give one with --chat-template FILE")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    refused(written(tmp_path / "m", model_of("llama", vocab_size=200)), "not of one model")


# Hub ids and paths


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "a/b/c", "none.gguf", "", "a b"])
def test_a_path_that_is_not_there_is_refused(name: str) -> None:
    refused(name, "no such file or folder")


def test_without_a_network_a_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing-at-all", "'nobody/nothing-at-all' is no folder .* cannot be reached")

    def away(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("x")

    monkeypatch.setattr("exporters.model.checkpoint.snapshot_download", away)
    refused("nobody/nothing-at-all", "cannot be reached")
    refused("nobody/..", "cannot be reached|neither")


def test_a_hub_id_loads_its_snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = folder.rename(folder.with_name("0123abcd"))

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert name == "org/model"
        assert not any("bin" in p or p == "*" for p in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("exporters.model.checkpoint.snapshot_download", download)
    assert load_checkpoint("org/model").source.startswith("org/model@0123abcd (safetensors): ")


# GGUF

_STEMS = {
    "model.embed_tokens": gguf.MODEL_TENSOR.TOKEN_EMBD,
    "model.norm": gguf.MODEL_TENSOR.OUTPUT_NORM,
    "lm_head": gguf.MODEL_TENSOR.OUTPUT,
}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rotary rows, from Hugging Face's."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def add_weights(
    w: gguf.GGUFWriter, model: PreTrainedModel, name: str, quantized: gguf.GGMLQuantizationType
) -> None:
    """Every tensor of the model in the order and under the names of architecture ``name``."""
    c = model.config
    arch = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}[name]
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        stem, leaf = key.rsplit(".", 1)
        values = tensor.numpy()
        if name.startswith("gemma") and key.endswith("norm.weight"):
            values = values + 1
        if name == "llama" and ".q_proj." in key:
            values = permuted(values, c.num_attention_heads)
        if name == "llama" and ".k_proj." in key:
            values = permuted(values, c.num_key_value_heads)
        kind = quantized if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(values), kind)
        w.add_tensor(f"{names.get_name(stem)}.{leaf}", data, raw_dtype=kind)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, int | float | str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    template: str | None = TEMPLATE,
    add_bos: bool = False,
    vocab: list[str] | None = None,
    pairs: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file of a Hugging Face model, as llama.cpp's converter writes it. ``vocab``:
    SentencePiece's, with ``pairs`` of metadata; else byte-level."""
    c = model.config
    name = {"gemma3_text": "gemma3"}.get(c.model_type, c.model_type)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    w = gguf.GGUFWriter(path, name)
    w.add_vocab_size(c.vocab_size)
    w.add_context_length(c.max_position_embeddings)
    w.add_block_count(c.num_hidden_layers)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(head)
    if name in ("qwen3", "gemma2", "gemma3"):
        w.add_key_length(head)
        w.add_value_length(head)
    if getattr(c, "sliding_window", None) and name != "llama":
        w.add_sliding_window(c.sliding_window)
    if name == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    for key, value in (extra or {}).items():
        add = {int: w.add_uint32, float: w.add_float32, str: w.add_string}[type(value)]
        add(key, value)
    if vocab is not None:
        w.add_tokenizer_model("llama")
        w.add_token_list(vocab)
        w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(vocab) - 259))
        for key, value in (pairs or {}).items():
            add_pair = w.add_array if isinstance(value, list) else w.add_bool
            add_pair(key, value)
    else:
        parts = json.loads(backend().to_str())["model"]
        known = sorted(parts["vocab"], key=parts["vocab"].get)
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("default")
        w.add_token_list(known)
        w.add_token_types([3] * 3 + [1] * (len(known) - 3))
        w.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    w.add_add_bos_token(add_bos)
    w.add_pad_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    if template:
        w.add_chat_template(template)
    add_weights(w, model, name, quantized)
    for key, values in (tensors or {}).items():
        w.add_tensor(key, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [(name, "F32") for name in ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")]
    + [("llama", "F16"), ("llama", "BF16"), ("llama", "Q4_1"), ("phi3", "Q8_0")],
)
def test_gguf_is_what_transformers_reads(tmp_path: Path, model_type: str, kind: str) -> None:
    model = model_of(model_type)
    path = write_gguf(tmp_path / "m.gguf", model, gguf.GGMLQuantizationType[kind])
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    checkpoint = load_checkpoint(str(path))
    expected = theirs.state_dict()
    assert checkpoint.state.keys() >= expected.keys() - {"lm_head.weight"}
    for name in checkpoint.state:
        assert checkpoint.state[name].dtype == torch.float32
        assert torch.equal(checkpoint.state[name], expected[name])
    if kind == "F32":  # nothing lost: the same model as before it was written
        torch.testing.assert_close(logits(checkpoint.hf_model()), logits(model))
    if model_type != "phi3":  # transformers leaves out Phi3's sliding window
        assert torch.equal(logits(checkpoint.hf_model()), logits(theirs))
    expected = logits(checkpoint.hf_model())
    assert tiny.relative(ours(checkpoint), expected) <= bound_of(checkpoint)
    assert checkpoint.chat_template == TEMPLATE
    assert checkpoint.eos_ids == (2,)
    assert checkpoint.source.startswith("m.gguf (GGUF): m.gguf sha256:")


def test_gguf_tokenizer_is_the_original(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"))
    tokenizer = load_checkpoint(str(path)).tokenizer
    assert tokenizer.encode(TEXT, add_special_tokens=False) == tokenizer_of().encode(TEXT)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert max(tokenizer.get_vocab().values()) == len(backend().get_vocab()) - 1
    path = write_gguf(tmp_path / "b.gguf", model_of("llama"), add_bos=True)
    assert load_checkpoint(str(path)).tokenizer.encode("cat")[0] == 1


@pytest.mark.parametrize("prefix", [None, True, False])
def test_the_space_before_a_ggufs_text(tmp_path: Path, prefix: bool | None) -> None:
    """SentencePiece's, by llama.cpp's rule: there, unless the file says that it is not."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "h", "i"]
    vocab += ["\u2581h", "hi", "\u2581hi"]
    model = model_of("llama", vocab_size=len(vocab))
    pairs: dict[str, object] = {
        "tokenizer.ggml.scores": [0.0] * (len(vocab) - 3) + [-1.0, -2.0, -3.0]
    }
    if prefix is not None:
        pairs["tokenizer.ggml.add_space_prefix"] = prefix
    path = write_gguf(tmp_path / "m.gguf", model, vocab=vocab, pairs=pairs)
    tokenizer = load_checkpoint(str(path)).tokenizer
    ids = tokenizer("hi", add_special_tokens=False)["input_ids"]
    told = [vocab[index] for index in ids]
    assert told == (["hi"] if prefix is False else ["\u2581hi"])
    assert tokenizer.decode(ids) == "hi"
    if prefix is False:
        space = tokenizer(" hi", add_special_tokens=False)["input_ids"]
        assert [vocab[index] for index in space] == ["\u2581hi"]
        assert tokenizer.decode(space) == " hi"


def test_llama3_frequencies_of_a_gguf_are_kept(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = model_of("llama", rope_parameters=scaling, max_position_embeddings=32768)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2).float() / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy()
    assert divisors.max() > 7
    path = write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": divisors})
    checkpoint = load_checkpoint(str(path))
    assert checkpoint.config.rope_parameters == scaling
    torch.testing.assert_close(logits(checkpoint.hf_model()), logits(model))
    odd = divisors + np.linspace(0, 1, 8, dtype=np.float32)
    refused(
        write_gguf(tmp_path / "odd.gguf", model, tensors={"rope_freqs.weight": odd}),
        "not those of Llama 3",
    )


def test_linear_scaling_of_a_gguf_is_kept(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = model_of("llama", rope_parameters=scaling)
    extra: dict[str, int | float | str] = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }
    checkpoint = load_checkpoint(str(write_gguf(tmp_path / "m.gguf", model, extra=extra)))
    torch.testing.assert_close(logits(checkpoint.hf_model()), logits(model))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn'"),
        ({"llama.attention.scale": 0.5}, r"attention.scale = 0.5"),
        ({"llama.expert_count": 8}, "expert_count = 8"),
        ({"llama.attention.key_length": 32}, "rotation of 16 of 32 channels"),
        ({"split.count": 3}, "one part of 3"),
        ({"tokenizer.ggml.unknown_token_id": 999}, "unknown_token_id is 999"),
    ],
)
def test_a_gguf_that_would_be_changed_is_refused(
    tmp_path: Path, extra: dict[str, int | float | str], words: str
) -> None:
    refused(write_gguf(tmp_path / "m.gguf", model_of("llama"), extra=extra), words)


def test_gguf_with_a_tensor_too_many_or_no_template_is_refused(tmp_path: Path) -> None:
    model, zeros = model_of("llama"), {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}
    refused(write_gguf(tmp_path / "a.gguf", model, tensors=zeros), "blk.0.attn_sinks.weight")
    path = write_gguf(tmp_path / "b.gguf", model, template=None)
    refused(path, "no chat template; give one with --chat-template FILE")
    given = tmp_path / "chat.jinja"
    given.write_text(TEMPLATE)
    assert load_checkpoint(str(path), chat_template=given).chat_template == TEMPLATE


def test_broken_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"))
    whole = path.read_bytes()
    for size in (0, 2, 4, 7, 20, 24, 40, 300, 3000, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:size])
        refused(path, "empty|not a GGUF file|truncated or corrupt")
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    refused(path, "not a GGUF file")
    path.write_bytes(whole[:4] + b"\x09" + whole[5:])
    refused(path, "GGUF version 9")
    path.write_bytes(whole[:8] + b"\xff" * 16 + whole[24:])
    refused(path, "truncated or corrupt")


def test_flipped_header_bytes_never_escape_as_anything_else(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model_of("llama"))
    whole = bytearray(path.read_bytes())
    header = len(whole) - 64 * 320 * 4  # at least the whole header is before the embedding's end
    rng = np.random.default_rng(0)
    for at in rng.integers(0, min(header, 12000), 60):
        broken = bytearray(whole)
        broken[at] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        with contextlib.suppress(ExportError):
            load_checkpoint(str(path))


def test_an_unsupported_gguf_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "architecture 'gpt2' is not supported as GGUF; supported: llama")


@pytest.mark.full
def test_smollm2_is_what_transformers_reads() -> None:
    if not SHARED.is_file():
        pytest.skip("SmolLM2-135M-Instruct.Q4_1.gguf is not in ../shared/models")
    torch.set_num_threads(1)
    theirs = AutoModelForCausalLM.from_pretrained(
        SHARED.parent, gguf_file=SHARED.name, dtype=torch.float32, attn_implementation="eager"
    )
    checkpoint = load_checkpoint(str(SHARED))
    expected = theirs.state_dict()
    assert checkpoint.state.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in checkpoint.state.items():
        assert torch.equal(tensor, expected[name])
    assert torch.equal(logits(checkpoint.hf_model()), logits(theirs))
    tokenizer = AutoTokenizer.from_pretrained(SHARED.parent, gguf_file=SHARED.name)
    assert checkpoint.tokenizer.encode(TEXT) == tokenizer.encode(TEXT)
    assert checkpoint.chat_template == tokenizer.chat_template
