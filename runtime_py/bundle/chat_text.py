"""A bundle's chat template and tokenizer: from turns to text to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from runtime_py.bundle.bundle import Bundle
from runtime_py.loop.dialogue import Turn
from runtime_py.loop.errors import BundleError, PromptTooLong


class ChatText:
    """Renders and encodes as docs/bundle.md says under "Text"."""

    def __init__(self, bundle: Bundle) -> None:
        from transformers import PreTrainedTokenizerFast

        facts = bundle.manifest.tokenizer
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(bundle.path / facts.file))
        special = {"bos_token": facts.bos_id, "eos_token": facts.eos_ids[0]}
        for name, index in special.items():  # chat templates write them out
            if index is not None:
                setattr(self.tokenizer, name, self.tokenizer.convert_ids_to_tokens(index))
        self.template = (bundle.path / facts.chat_template).read_text(encoding="utf-8")
        self._manifest = bundle.manifest
        self.stops = [str(self.tokenizer.convert_ids_to_tokens(index)) for index in facts.eos_ids]

    def render(self, turns: Sequence[Turn], reply: bool = False) -> str:
        """The template's text; ``reply``: up to where the assistant begins to speak."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=reply
        )
        return cast(str, text)  # because of tokenize=False

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text count as such, none are added."""
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and which characters of the text each stands for: [begin, end)."""
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def prompt(self, messages: Sequence[Turn], prefix: str = "") -> list[int]:
        """Token ids up to where the assistant begins to speak, and of what its reply begins with.

        Where they fill the context the oldest exchanges are left out. Raises ``PromptTooLong``
        where even the last message does.
        """
        context, taken = self._manifest.model.context, 0
        for first in range(0, len(messages), 2):
            ids = self.encode(self.render(messages[first:], reply=True) + prefix)
            taken = len(ids)
            if taken < context:
                return ids
        raise PromptTooLong(
            f"the last message takes {taken} tokens, and the model's context holds {context}, of "
            f"which a reply needs one; shorten the message."
        )

    def assistant_spans(
        self, turns: Sequence[Turn], last_only: bool = False
    ) -> list[tuple[int, int]]:
        """Where the assistant speaks in ``render(turns)``: characters [begin, end) of each of its
        turns, or of the last alone, the token that ends it included.

        Raises ``BundleError`` where the template writes one of these turns differently once more
        turns follow: with ``last_only`` it may do so with those before the last.
        """
        whole, spans = self.render(turns), []
        places = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        for index in places[-1:] if last_only else places:
            before = self.render(turns[:index], reply=True)
            after = self.render(turns[: index + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise BundleError(
                    f"the chat template writes turn {index + 1} of {len(turns)} otherwise when "
                    f"later ones follow, or begins that reply otherwise than it writes it, so the "
                    f"assistant's tokens cannot be told from the others: export with another "
                    f"--chat-template."
                )
            ends = [
                after.rfind(stop) + len(stop) for stop in self.stops if stop in after[len(before) :]
            ]
            spans.append((len(before), max(ends) if ends else len(after)))
        return spans
