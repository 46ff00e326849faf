"""What can go wrong on the phone: one family of exceptions, each message a sentence to act on."""

from __future__ import annotations


class AttuneError(Exception):
    """The message says what was wrong, where, what was expected, and what to do."""


class LoopError(AttuneError):
    """Something that the loop was given, or a store, cannot be used."""


class DuplicateDialogue(LoopError):  # noqa: N818 - what happened, not that it is an error
    """This id was observed before; a host that resumes a stream may skip it."""


class AnswerTooLong(LoopError):  # noqa: N818
    """The answer leaves no room for the set in its bin or in a lesson: a host may shorten it."""


class PromptTooLong(LoopError):  # noqa: N818
    """The last message alone fills the model's context, so that nothing can be replied."""


class StoreBusy(LoopError):  # noqa: N818
    """Another process has the store open."""


class StoreDamaged(LoopError):  # noqa: N818
    """The file is not a sound store. It is left as it is; ``recovery.recover`` can read it."""


class WriteError(LoopError):
    """A file or folder cannot be written. Nothing of it is there; what was there before is."""


class DiskFull(WriteError):  # noqa: N818
    """No space is left. Nothing of it is there, and what was there before is."""


class BundleError(AttuneError):
    """A bundle cannot be used as asked."""


class AdapterError(AttuneError):
    """An adapter cannot be used as asked."""


class TrainingError(AttuneError):
    """Data, state or weights of a training run cannot be used."""


class TrainingStateUnusable(TrainingError):  # noqa: N818
    """What an earlier run left is damaged, or of another run: it can only begin anew."""


class TrainingDiverged(TrainingError):  # noqa: N818
    """The loss or the gradient is not a number any more; the state before the step is whole."""
