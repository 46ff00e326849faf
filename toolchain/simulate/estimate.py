"""Whether a device can hold a bundle, estimated before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.manifest import Manifest
from runtime_py.engine.memory import training_bytes
from runtime_py.loop.errors import LoopError
from runtime_py.loop.policy import LoopPolicy
from toolchain.simulate.device import Device
from toolchain.simulate.roofline import Counter

APP_MB = 25.0  # store, buffer, lexicons and what an app has of its own
TOKENIZER = 12  # times its file
PACKED = 0.75  # of lm.pte
LOG_BYTES = 600  # of a dialogue in the store's log


@dataclass(frozen=True)
class Estimate:
    """MB. ``idle``: the app and the tokenizer; ``lm``: both of its methods in memory, ``lean`` the
    larger one; ``training`` with the longest sequences, ``least`` with the shortest. Model and
    training never stand in memory together."""

    idle: float
    lm: float
    lean: float
    training: float
    least: float
    storage: float

    @property
    def peak(self) -> float:
        return self.idle + max(self.lm, self.training)

    @property
    def least_peak(self) -> float:
        return self.idle + max(self.lean, self.least)

    def within(self, limit_mb: float) -> float:
        """The peak where the loop takes no more than it must to stay within the limit."""
        return self.peak if self.peak <= limit_mb else self.least_peak

    def must_be_lean(self, limit_mb: float) -> bool:
        return self.idle + self.lm > limit_mb


def estimate(bundle: Bundle, policy: LoopPolicy, places: int) -> Estimate:
    """What the loop takes with the bundle, its log after ``places`` dialogues."""
    training, manifest = bundle.training, bundle.manifest
    adapter = manifest.adapter
    sizes = Counter(bundle).sizes
    files = {file.path: file.bytes for file in manifest.files}
    tokens = min(512, manifest.model.context)
    cache = 8 * sizes.layers * manifest.model.context * sizes.keys
    wide = 4 * tokens * (6 * manifest.model.hidden + 3 * sizes.inner)
    # Each method packs the weights, without the token table, into the delegate's own memory.
    packed = PACKED * files["android/lm.pte"] + wide
    forward = packed + cache + 8 * manifest.model.vocab
    longest = min(policy.longest_sequence_tokens, max(training.lengths))
    shortest = min(policy.shortest_sequence_tokens, longest)

    def trained(length: int) -> float:
        fitting = min(capacity for capacity in training.lengths if capacity >= length)
        return (training_bytes(bundle, fitting) + files[training.weights]) / 1e6

    numbers = sum(math.prod(tensor.shape) for tensor in adapter.tensors)
    kept = (policy.adapters_kept + 2) * bundle.android.adapter.stat().st_size + 24 * numbers
    store = 1.5 * policy.bins * policy.bin_bytes + LOG_BYTES * places
    return Estimate(
        idle=APP_MB + TOKENIZER * files[manifest.tokenizer.file] / 1e6,
        lm=(packed + forward) / 1e6,
        lean=forward / 1e6,
        training=trained(longest),
        least=trained(shortest),
        storage=(sum(files.values()) + kept + store) / 1e6,
    )


def check_fits(device: Device, need: Estimate, manifest: Manifest) -> None:
    """Raises ``LoopError`` where the device cannot hold the bundle, with the sum that shows it."""
    limit = device.memory.app_mb
    wrong = []
    if need.least_peak > limit:
        wrong.append(
            f"it lets an app have {limit:,.0f} MB, and the loop needs about "
            f"{need.least_peak:,.0f} MB: {need.idle:,.0f} at rest, and {need.lean:,.0f} for the "
            f"language model while it answers or {need.least:,.0f} while it trains on the "
            f"shortest sequences, whichever is more"
        )
    if need.storage > device.storage.app_mb:
        wrong.append(
            f"it lets an app store {device.storage.app_mb:,.0f} MB, and the bundle with its store "
            f"and adapters takes about {need.storage:,.0f}"
        )
    if wrong:
        raise LoopError(
            f"{device.name} cannot hold {manifest.model.name}: {'; and '.join(wrong)}. Export a "
            f"smaller model, a shorter --context or a stronger --quantize, or choose another "
            f"--device."
        )
