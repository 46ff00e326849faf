"""What the programs are tried on: real dialogues, and inputs made to break things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from runtime_py.bundle.adapter_forms import read_values, to_runtime
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.manifest import Manifest
from runtime_py.bundle.peft_adapter import read_peft
from runtime_py.engine.examples import IGNORED, Example, sequences
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import TrainingError
from toolchain.compile.proofs import with_effect
from toolchain.compile.shipped_text import as_dialogue, shipped_dialogues

DECODED = 32  # tokens that are decoded one by one after a prompt
PROMPT = 65  # of a real dialogue: one more than a chunk of Core ML's prefill
LONGEST = 2048  # tokens of the case that fills the context; a longer context is not filled
INITIAL, EFFECT = "initial", "B ≠ 0"


@dataclass(frozen=True, eq=False)
class Case:
    """``tokens`` int64 [n]: the first ``prompt`` go in together, the others one by one."""

    name: str
    tokens: np.ndarray
    prompt: int
    text: str

    @property
    def steps(self) -> int:
        return len(self.tokens) - self.prompt


def dialogues(count: int) -> list[Dialogue]:
    """Of those that ship with attune: real ones, of different lengths."""
    every = shipped_dialogues("perplexity")
    step = max(1, len(every) // count)
    return [as_dialogue(f"shipped-{i}", every[i * step]) for i in range(count)]


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else flat[:159] + "…"


def cases(manifest: Manifest, text: ChatText, quick: bool = False) -> list[Case]:
    """Of the ``lm`` and ``embed`` programs. ``quick``: fewer and shorter."""
    context, vocab = manifest.model.context, manifest.model.vocab
    decoded = 4 if quick else DECODED
    chosen: list[Case] = []
    for dialogue in dialogues(1 if quick else 3):
        rendered = text.render(dialogue.turns)
        ids = np.array(text.tokens(dialogue.turns).ids, np.int64)
        prompt = min(PROMPT, max(1, len(ids) - decoded), max(1, context - decoded))
        ids = ids[: prompt + decoded]
        chosen.append(Case(dialogue.id, ids, prompt, _short(rendered)))
    eos = manifest.tokenizer.eos_ids[0]
    pad = manifest.tokenizer.pad_id or 0
    real = chosen[0].tokens
    few = min(decoded, 4)
    chosen.append(Case("one token", real[: 1 + few], 1, "its first token alone"))
    word = int(real[len(real) // 2])
    repeated = np.full(min(40 + few, context), word, np.int64)
    chosen.append(Case("one token repeated", repeated, len(repeated) - few, f"token {word}, 40 ×"))
    odd = np.array([pad, eos, vocab - 1, 0] * 6, np.int64)[: min(24, context)]
    padded = np.concatenate([real[:8], odd, real[8:16]])[: context - few]
    chosen.append(
        Case("padding and end tokens", padded, max(1, len(padded) - few), "amid a dialogue")
    )
    if not quick:
        whole = min(context, LONGEST)
        long = np.resize(np.concatenate([c.tokens for c in chosen[:3]]), whole)
        chosen.append(Case("full context", long, whole - 2, f"{whole} tokens of dialogues"))
    return chosen


def adapters(bundle: Bundle) -> dict[str, dict[str, np.ndarray]]:
    """The bundle's own adapter, and one that has an effect: the programs' tensors by name."""
    section, peft = bundle.manifest.adapter, read_peft(bundle.peft)
    if section.runtime is not None:
        values = read_values(bundle.path / section.runtime, section.tensors)
    else:
        values = to_runtime(peft, section.tensors)
    initial = {tensor.name: values[tensor.name] for tensor in section.tensors}
    effect = with_effect(initial)
    for name, value in effect.items():
        module, part = name.rsplit(".", 1)
        rank = peft.rank_of(f"model.{module}")
        # Beyond a module's own rank there is padding, which PEFT's module has no place for.
        if part == "lora_A":
            value[:, rank:] = 0.0
        elif part != "scale":
            value[:, :, rank:] = 0.0
    return {INITIAL: initial, EFFECT: effect}


def examples(bundle: Bundle, text: ChatText, quick: bool = False) -> list[Example]:
    """For training: real dialogues that fill the programs of each length, which no shorter ones
    hold; one that leaves the shortest padded, and one single label."""
    lengths, room = sorted(bundle.training.lengths), bundle.manifest.model.context - 1
    fitting: list[Example] = []
    for dialogue in dialogues(20):
        try:
            fitting += sequences(dialogue, text)
        except TrainingError:
            continue
    fitting.sort(key=lambda e: len(e.tokens))
    full = [_filling(fitting, min(length, room)) for length in lengths]
    if quick:
        return full
    cuts = (_cut(one, lengths[-1]) for one in fitting)
    shortest = next((one for one in cuts if (one.labels != IGNORED).any()), full[0])
    labels = np.full(2, IGNORED, np.int64)
    labels[1] = shortest.tokens[1]
    single = Example("one token", shortest.tokens[:2], labels)
    word = np.full(min(24, lengths[-1]), shortest.tokens[len(shortest.tokens) // 2], np.int64)
    again = Example("one token repeated", word, np.concatenate([[IGNORED], word[1:]]))
    return [shortest, *full, single, again]


def _cut(whole: Example, length: int) -> Example:
    return Example(whole.id, whole.tokens[: length + 1], whole.labels[: length + 1])


def _filling(fitting: Sequence[Example], length: int) -> Example:
    """Of ``length`` input tokens: the longest dialogues put end to end, as many as it takes, and as
    often as it takes where all are too short. Its last token is a label."""
    chosen: list[Example] = []
    for one in cycle(reversed(fitting)):
        chosen.append(one)
        if sum(len(e.tokens) for e in chosen) > length:
            break
    tokens = np.concatenate([e.tokens for e in chosen])[: length + 1]
    labels = np.concatenate([e.labels for e in chosen])[: length + 1]
    labels[-1] = tokens[-1]
    name = chosen[0].id if len(chosen) == 1 else f"{length} tokens from {chosen[0].id}"
    return Example(name, tokens, labels)
