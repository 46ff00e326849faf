"""A bundle's chat pieces and tokenizer: from turns to text to tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from runtime_py.bundle import manifest as m
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_pieces import UNSAID, parts_of, segments, words, written_alike
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import BundleError, PromptTooLong


@dataclass(frozen=True)
class Tokens:
    """``ids``, and for each the index of the assistant's turn that says it, or ``UNSAID``."""

    ids: list[int]
    said: list[int]


class ChatText:
    """Renders, encodes and decodes as docs/bundle.md says under "Text".

    ``tokenizer``: the bundle's, for which a special token in a text is text (it is changed so).
    """

    def __init__(self, tokenizer: Backend, facts: m.Tokenizer, context: int) -> None:
        self.tokenizer, self.facts, self.context = tokenizer, facts, context
        tokenizer.encode_special_tokens = True
        self.stops = [self._written(index) for index in facts.eos_ids]
        known = tokenizer.get_added_tokens_decoder().items()
        self._hidden = {i for i, token in known if token.special} - {*facts.shown_ids}

    @classmethod
    def of(cls, bundle: Bundle) -> ChatText:
        """A bundle's."""
        manifest = bundle.manifest
        backend = Backend.from_file(str(bundle.path / manifest.tokenizer.file))
        return cls(backend, manifest.tokenizer, manifest.model.context)

    def _written(self, item: m.Item) -> str:
        return item if isinstance(item, str) else str(self.tokenizer.id_to_token(item))

    def render(self, turns: Sequence[Turn], reply: bool = False) -> str:
        """The text, special tokens as they are written; ``reply``: up to where the assistant begins
        to speak."""
        return "".join(self._written(part.item) for part in parts_of(self.facts, turns, reply))

    def tokens(self, turns: Sequence[Turn], reply: bool = False, prefix: str = "") -> Tokens:
        """Of the whole dialogue, or with ``reply`` up to where the assistant begins to speak, and
        of the ``prefix`` that its reply begins with."""
        ids: list[int] = []
        said: list[int] = []
        for segment in segments(parts_of(self.facts, turns, reply, prefix)):
            if isinstance(segment.item, int):
                ids.append(segment.item)
                said.append(segment.said[0][2] if segment.said else UNSAID)
                continue
            encoding = self.tokenizer.encode(segment.item, add_special_tokens=False)
            ids += encoding.ids
            said += _sayers(encoding.offsets, segment.said)
        return Tokens(ids, said)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a special token; none are added."""
        clean = words(text, m.Strip(), self.facts.normalize)
        ids: list[int] = self.tokenizer.encode(clean, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of what was written, without special tokens but those that are shown."""
        kept = [index for index in ids if index not in self._hidden]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    @property
    def written_alike(self) -> bool:
        """Whether one sequence teaches every turn of the assistant's, and not the last alone."""
        return written_alike(self.facts.chat, self.facts.eos_ids)

    def prompt(self, messages: Sequence[Turn], prefix: str = "") -> list[int]:
        """Token ids up to where the assistant begins to speak, and of what its reply begins with.

        Where they fill the context the oldest exchanges are left out. Raises ``PromptTooLong``
        where even the last message does.
        """
        taken = 0
        for first in range(0, len(messages), 2):
            ids = self.tokens(messages[first:], True, prefix).ids
            taken = len(ids)
            if taken < self.context:
                return ids
        raise PromptTooLong(
            f"the last message takes {taken} tokens, and the model's context holds {self.context}, "
            f"of which a reply needs one; shorten the message."
        )

    def for_runner(self, turns: Sequence[Turn], reply: bool = True) -> str:
        """``render`` for a runner that takes text and knows special tokens in it, as ExecuTorch's.

        Raises ``BundleError`` where it would read a turn's words as one.
        """
        text = self.render(turns, reply)
        if self.read_by_runner(text) != self.tokens(turns, reply).ids:
            raise BundleError(
                "what was said holds the text of a special token, which a runner that takes text "
                f"obeys ({self._culprits(turns)}): leave it out, or hand token ids to the program."
            )
        return text

    def read_by_runner(self, text: str) -> list[int]:
        """Token ids as a runner reads them that takes text: special tokens in it count as such."""
        self.tokenizer.encode_special_tokens = False
        try:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
            return ids
        finally:
            self.tokenizer.encode_special_tokens = True

    def _culprits(self, turns: Sequence[Turn]) -> str:
        known = self.tokenizer.get_added_tokens_decoder().values()
        special = [str(token.content) for token in known if token.special]
        found = {one for one in special for turn in turns if one in turn.content}
        return ", ".join(sorted(found)) or "at the edge of a turn"


def _sayers(offsets: Sequence[tuple[int, int]], said: Sequence[tuple[int, int, int]]) -> list[int]:
    """For each token, from the characters [begin, end) that it stands for, whose it is. One that
    begins in the prompt and ends in the reply is the reply's."""
    sayers = []
    for index, (begin, end) in enumerate(offsets):
        if begin == end:  # a tokenizer that trims spaces off a token's characters
            begin = offsets[index - 1][1] if index else 0
        found = [turn for start, stop, turn in said if end > start and begin < stop]
        sayers.append(found[0] if end > begin and found else UNSAID)
    return sayers
