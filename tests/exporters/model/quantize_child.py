"""Prints the SHA-256 of everything that quantization makes of a few small models, one a line.

A process of its own: how many threads and which instructions PyTorch uses is settled at its start.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from exporters.model.assembly import build
from exporters.model.quantize import Scheme, quantized
from exporters.model.rounding import Rounded, round_search
from exporters.model.spec import read_spec
from exporters.model.transformer import Transformer, rope_tables

SIZES = {
    "vocab_size": 200,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama3": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e5, **LLAMA3}),
    "yarn": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **YARN}),
    "gemma2": Gemma2Config(**SIZES, head_dim=32, sliding_window=16),
}
GPTQ = Scheme(bits=4, head_bits=8, affine=True, gptq=True)


def numbers(seed: int, *shape: int) -> Tensor:
    """Nearly normal, by integer arithmetic alone: PyTorch's own ``randn`` follows the processor."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randint(0, 1 << 12, (12, *shape), generator=generator).sum(0)
    return (parts - 6 * 4095).float() / 4096.0


def model(config: PreTrainedConfig) -> Transformer:
    """Weights that come from no 4-bit grid, some far larger than others."""
    state = AutoModelForCausalLM.from_config(config).state_dict()
    for index, (name, tensor) in enumerate(sorted(state.items())):
        own = numbers(index, *tensor.shape)
        if tensor.ndim == 2:
            own *= 0.05
            own[:, ::17] *= 4.0
        state[name] = own if tensor.ndim == 2 else 1.0 + 0.1 * own
    return build(read_spec(config), state)


def sha(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def buffers(module: nn.Module) -> list[Tensor]:
    return [tensor for _, tensor in sorted(module.named_buffers())]


def rounded(value: Rounded) -> list[Tensor]:
    inner = rounded(value.offset) if value.offset is not None else []
    return [value.q, value.scale, *inner]


def main() -> None:
    texts = [torch.randint(0, 200, (1, n), generator=torch.Generator().manual_seed(n)) for n in
             (70, 131, 2)]  # fmt: skip
    for name, config in CONFIGS.items():
        spec = read_spec(config)
        ropes = dict.fromkeys(layer.rope for layer in spec.layers if layer.rope)
        tables = [t for r in ropes for t in rope_tables(r, 512, spec.head_dim)]
        print(f"{name} rotary tables {sha(*tables)}")
    for name in ("llama", "gemma2"):
        made = quantized(model(CONFIGS[name]), GPTQ, texts)
        print(f"{name} 8da4w by GPTQ {sha(*buffers(made))}")
    plain = model(CONFIGS["llama"])
    print(f"llama 8da8w {sha(*buffers(quantized(plain, Scheme(8, 8), texts)))}")
    searched = round_search(plain.head.weight, 4, 32, None, True)
    print(f"8da4w with offsets {sha(*rounded(searched))}")
    recovered = plain
    for block in recovered.blocks:  # weights that come from a 4-bit grid
        for site in ("qkv", "o", "gate_up", "down"):
            for base in getattr(block, site).bases:
                base.weight = round_search(base.weight, 4, 32, None, True).dequantize()
    print(f"llama 8da4w recovered {sha(*buffers(quantized(recovered, GPTQ, texts)))}")


if __name__ == "__main__":
    main()
