"""A bundle's ``lm.pte`` against PyTorch with the very same weights, on dialogues.

Every single operator of the two agrees to float32's last bits. Where activations are rounded to
int8 the two drift apart nevertheless, as far as PyTorch drifts from itself when its token
embeddings change in the last bit (``toolchain.compile.noise``): that is the *noise floor*, and what
is left of ExecuTorch's difference beside it would be an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from exporters.model.lora_tensors import set_adapter
from exporters.model.transformer import Transformer
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.flat_tensor import read_ptd
from runtime_py.engine.lm import ExecutorchLm
from runtime_py.engine.native import silenced
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import BundleError
from toolchain.compile.noise import PERTURBATION, perturbed
from toolchain.compile.shipped_text import perplexity, shared_prefix, tokenize
from toolchain.compile.source import CheckpointSource, as_in_bundle, float_model

TRIALS = 3  # perturbed models
WORST_RATIO = 0.01  # of perplexity, between the program and PyTorch


@dataclass(frozen=True)
class Difference:
    """Between two models' logits on one dialogue. Relative to the reference's range:
    ``largest`` = max |a − b| / max |b|; ``rms`` = ‖a − b‖ / ‖b‖. ``same_token``: share of
    positions with the same most likely token."""

    largest: float
    rms: float
    same_token: float


@dataclass(frozen=True)
class Evaluation:
    """``same_token``: share of all predicted positions where program and PyTorch agree.

    ``first``: program against PyTorch on the first dialogue; ``floor``: PyTorch perturbed against
    PyTorch on the same, the mean of ``TRIALS``.
    """

    quantize: str
    dialogues: int
    tokens: int
    executorch: float
    pytorch: float
    float32: float
    same_token: float
    first: Difference
    floor: Difference

    @property
    def ratio(self) -> float:
        """Perplexity of the program over PyTorch's with the same weights."""
        return self.executorch / self.pytorch

    @property
    def passed(self) -> bool:
        return abs(self.ratio - 1.0) <= WORST_RATIO

    def as_json(self) -> dict:
        """For ``--json``: perplexities a token, ratios and shares as plain numbers."""
        return {
            "quantize": self.quantize,
            "dialogues": self.dialogues,
            "tokens": self.tokens,
            "perplexity": {
                "executorch": self.executorch,
                "pytorch_same_weights": self.pytorch,
                "pytorch_float32": self.float32,
            },
            "ratio_to_pytorch": self.ratio,
            "within_1_percent": self.passed,
            "ratio_to_float32": self.executorch / self.float32,
            "same_greedy_token": self.same_token,
            "first_dialogue": asdict(self.first),
            "noise_floor": asdict(self.floor) | {"perturbation": PERTURBATION, "trials": TRIALS},
        }


def perturbed_logits(model: Transformer, tokens: Tensor, seed: int) -> Tensor:
    """Logits [1, S, V] with float32 noise of one bit on the token embeddings."""
    with perturbed(model, seed):
        return model(tokens)


def difference(measured: Tensor, expected: Tensor) -> Difference:
    """Of logits [1, S, V]."""
    gap = measured - expected
    return Difference(
        largest=(gap.abs().max() / expected.abs().max()).item(),
        rms=(gap.norm() / expected.norm()).item(),
        same_token=(measured.argmax(-1) == expected.argmax(-1)).float().mean().item(),
    )


def _mean(differences: Sequence[Difference]) -> Difference:
    rows = [(d.largest, d.rms, d.same_token) for d in differences]
    return Difference(*(sum(column) / len(rows) for column in zip(*rows, strict=True)))


class _Watched:
    """Logits of one model, and the most likely token after each position of each text."""

    def __init__(self, logits: Callable[[Tensor], Tensor], progress: Callable[[int], None]) -> None:
        self._logits, self._progress = logits, progress
        self.tokens: list[Tensor] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        logits = self._logits(tokens)
        self.tokens.append(logits[0].argmax(-1))
        self._progress(tokens.shape[1])
        return logits


def texts_of(bundle: Bundle, dialogues: Sequence[Dialogue], longest: int) -> list[Tensor]:
    """Rendered and tokenized as the bundle does it; cut to its context.

    Raises ``BundleError`` where nothing is left beside what all texts begin with.
    """
    longest = min(longest, bundle.manifest.model.context)
    texts = tokenize(ChatText.of(bundle), [dialogue.turns for dialogue in dialogues], longest)
    if not texts or shared_prefix(texts) == max(text.shape[1] for text in texts):
        raise BundleError(
            "perplexity does not count what all dialogues begin with, and here nothing else is "
            "left: give at least two different dialogues."
        )
    return texts


@torch.no_grad()
def evaluate(
    bundle: Bundle,
    source: CheckpointSource,
    texts: Sequence[Tensor],
    *,
    threads: int,
    stage: Callable[[str, int], None] = lambda name, tokens: None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluation:
    """Runs ``texts`` (int64 [1, S] each) through the program, token by token as in decoding, and
    through PyTorch. ``stage`` is told what begins and its number of tokens, ``progress`` how many
    tokens were done since."""
    torch.set_num_threads(threads)
    manifest, files = bundle.manifest, bundle.android
    total = sum(text.shape[1] for text in texts)
    stage("quantize in PyTorch", 0)
    plain = float_model(manifest, source)
    set_adapter(plain, read_ptd(files.adapter))
    model = as_in_bundle(plain, bundle, source)
    first = texts[0]
    stage("PyTorch, the same weights", total)
    expected = model(first)
    on_torch = _Watched(model, progress)
    pytorch = perplexity(on_torch, texts)
    float32 = pytorch
    if model is not plain:
        stage("PyTorch, float32", total)
        float32 = perplexity(_Watched(plain, progress), texts)
    stage("PyTorch, perturbed", TRIALS * first.shape[1])
    floors = []
    for seed in range(TRIALS):
        floors.append(difference(perturbed_logits(model, first, seed), expected))
        progress(first.shape[1])
    stage("ExecuTorch, token by token", total)
    with silenced():
        lm = ExecutorchLm(files.lm, files.adapter, threads)
    on_executorch = _Watched(lm.all_logits, progress)
    executorch = perplexity(on_executorch, texts)
    start = max(shared_prefix(texts), 1) - 1  # the first position whose next token counts
    same = torch.cat(
        [
            a[start:-1] == b[start:-1]
            for a, b in zip(on_executorch.tokens, on_torch.tokens, strict=True)
        ]
    )
    return Evaluation(
        quantize=files.target.quantize,
        dialogues=len(texts),
        tokens=same.numel(),
        executorch=executorch,
        pytorch=pytorch,
        float32=float32,
        same_token=same.float().mean().item(),
        first=difference(lm.all_logits(first), expected),
        floor=_mean(floors),
    )
