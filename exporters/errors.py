"""The one exception of a user's mistake: a sentence, without a traceback."""

from __future__ import annotations


class ExportError(Exception):
    """Input that cannot be exported as asked; the message says what, where, and what to do."""
