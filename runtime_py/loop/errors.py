"""What can go wrong in the loop: one family of exceptions, each message a sentence to act on."""

from __future__ import annotations


class LoopError(Exception):
    """The message says what was wrong, where, what was expected, and what to do."""


class DuplicateDialogue(LoopError):  # noqa: N818 - what happened, not that it is an error
    """This id was observed before; a host that resumes a stream may skip it."""


class StoreBusy(LoopError):  # noqa: N818
    """Another process has the store open."""


class StoreDamaged(LoopError):  # noqa: N818
    """The file is not a sound store. It is left as it is; ``recovery.recover`` can read it."""


class StoreFull(LoopError):  # noqa: N818
    """No space left. What was being written is not there; everything before it is."""
