"""The recipe of the built-in model: tokenizer, training, evaluation, samples; seeded throughout.

    python -m toolchain.compile.builtin.recipe --corpus DIR --out DIR

DIR of the corpus holds the gzip JSONL files named in ``SOURCES`` (one dialogue a line, see
``docs/builtin-model.md``). The result is an ordinary Hugging Face folder.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20241104
SEQUENCE = 512  # tokens in a training sequence, and the model's context
BATCH = 8  # sequences in an optimizer step
VOCABULARY = 4096
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# file, dialogues used at most, words a dialogue may have at most, passes over it in one epoch
SOURCES = [
    ("dolly_cc-by-sa.jsonl.gz", 9000, 160, 2),
    ("sgd_cc-by-sa.jsonl.gz", 4000, 400, 1),
    ("mts_dialog_cc-by.jsonl.gz", 2000, 300, 1),
]
SAMPLE_PROMPTS = [
    "Hi! How are you today?",
    "What is the capital of France?",
    "Give me three tips for sleeping better.",
    "I am looking for a restaurant in San Jose.",
    "I have had a headache for two days.",
    "Name some animals that live in the sea.",
    "Why is the sky blue?",
    "Can you book a table for two tonight at seven?",
    "What should I pack for a trip to the mountains?",
    "Write a short poem about the rain.",
]


def model_config(pad: int, bos: int, eos: int) -> LlamaConfig:
    """Llama, 4.5 M parameters, tied embeddings, grouped-query attention."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def held_out(dialogue_id: str) -> bool:
    """One dialogue in fifty, chosen by its id alone."""
    return hashlib.sha256(dialogue_id.encode()).digest()[0] < 5


def read_corpus(folder: Path) -> tuple[list[list[dict]], dict[str, list[list[dict]]]]:
    """Training dialogues (lists of turns), and held-out ones by dataset."""
    training: list[list[dict]] = []
    validation: dict[str, list[list[dict]]] = {}
    for name, most, words, passes in SOURCES:
        kept: list[list[dict]] = []
        with gzip.open(folder / name, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                turns = [{"role": t["role"], "content": t["content"].strip()} for t in row["turns"]]
                if sum(len(t["content"].split()) for t in turns) > words:
                    continue
                if held_out(row["id"]):
                    validation.setdefault(row["dataset"], []).append(turns)
                elif len(kept) < most:
                    kept.append(turns)
        training += kept * passes
    return training, {name: rows[:150] for name, rows in validation.items()}


def train_tokenizer(dialogues: list[list[dict]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the project's chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((t["content"] for d in dialogues for t in d), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        model_max_length=SEQUENCE,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, turns: list[dict]) -> list[int]:
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def sequences(dialogues: list[list[int]], seed: int) -> Iterator[torch.Tensor]:
    """Endless ``[BATCH, SEQUENCE]`` int64 batches: dialogues end to end, shuffled each epoch."""
    order = random.Random(seed)
    stream: list[int] = []
    need = BATCH * SEQUENCE
    while True:
        shuffled = list(range(len(dialogues)))
        order.shuffle(shuffled)
        for index in shuffled:
            stream += dialogues[index]
            while len(stream) >= need:
                yield torch.tensor(stream[:need]).view(BATCH, SEQUENCE)
                del stream[:need]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, dialogues: list[list[int]]) -> float:
    """Per-token perplexity over whole dialogues, each by itself."""
    total, count = 0.0, 0
    for ids in dialogues:
        batch = torch.tensor([ids[:SEQUENCE]])
        loss = model(batch, labels=batch).loss
        total += loss.item() * (batch.shape[1] - 1)
        count += batch.shape[1] - 1
    return math.exp(total / count)


def reply(model: Any, tokenizer: Any, prompt: str) -> str:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(ids, max_new_tokens=60, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def evaluate(model: Any, tokenizer: Any, validation: dict[str, list[list[int]]]) -> dict:
    model.eval()
    scores = {name: round(perplexity(model, rows), 2) for name, rows in validation.items()}
    samples = {prompt: reply(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS}
    model.train()
    return {"heldout_perplexity": scores, "samples": samples}


def save(model: Any, tokenizer: Any, out: Path, report: dict) -> None:
    copy: Any = LlamaForCausalLM(model.config)
    copy = copy.to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for norms and embedding."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def rate_at(step: int, steps: int) -> float:
    """Part of the peak: warm-up over 50 steps, constant, linear to zero over the last 40 %."""
    return min(step / 50, 1.0, (steps - step) / (0.4 * steps))


def train(model: Any, batches: Iterator[torch.Tensor], steps: int) -> Iterator[int]:
    """Yields the number of each step, after it."""
    updates = optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in updates]
    start = time.time()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        for optimizer, peak in zip(updates, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in updates:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 20 == 0:
            speed = step * BATCH * SEQUENCE / (time.time() - start)
            print(f"step {step} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        yield step


def main() -> None:
    """The command line: reads the corpus, trains, and saves at every evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--evaluate-every", type=int, default=300)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    dialogues, held = read_corpus(args.corpus)
    tokenizer = train_tokenizer(dialogues)
    tokens = [encode(tokenizer, turns) for turns in dialogues]
    validation = {name: [encode(tokenizer, t) for t in rows] for name, rows in held.items()}
    print(f"{len(tokens)} dialogues, {sum(map(len, tokens)):,} tokens an epoch", flush=True)

    vocabulary = tokenizer.get_vocab()
    model = LlamaForCausalLM(model_config(*(vocabulary[token] for token in SPECIAL[:3])))
    for step in train(model, sequences(tokens, SEED), args.steps):
        if step % args.evaluate_every == 0 or step == args.steps:
            report = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "steps": step,
                "tokens": step * BATCH * SEQUENCE,
                "seed": SEED,
            } | evaluate(model, tokenizer, validation)
            print(json.dumps(report, indent=1), flush=True)
            save(model, tokenizer, args.out, report)


if __name__ == "__main__":
    main()
