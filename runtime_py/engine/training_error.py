"""What can go wrong in training; each message is a sentence to act on."""

from __future__ import annotations


class TrainingError(Exception):
    """The message says what was wrong, where, what was expected, and what to do."""
