"""The tokenizer.json and chat pieces that every host reads alike, proven.

Hugging Face's library, which the model was trained with, and the C++ tokenizer of ExecuTorch's
runner do not read every tokenizer.json alike. Where they differ another file is written that both
read as Hugging Face reads the model's own; where there is none, the export is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from exporters.errors import ExportError
from exporters.model.checkpoint import Checkpoint
from runtime_py.bundle import manifest as m
from runtime_py.bundle.chat_text import ChatText
from toolchain.compile.chat_template import Template, TemplateText, compile_template
from toolchain.compile.tokenizer_pieces import chat_pieces
from toolchain.compile.tokenizer_proof import HuggingFaceReading
from toolchain.compile.tokenizer_rewriting import AddedToken, candidates, controls

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class PhoneText:
    """``tokenizer``: the file's text; ``facts``: its section of the manifest, with the pieces;
    ``apart``: as ``Rewriting`` has it."""

    tokenizer: str
    facts: m.Tokenizer
    apart: str

    def chat_text(self, context: int) -> ChatText:
        """As that of a bundle for ``context`` tokens."""
        return ChatText(Backend.from_str(self.tokenizer), self.facts, context)


def text_of(checkpoint: Checkpoint, where: str) -> PhoneText:
    """A checkpoint's; ``where``: what it is called. Raises ``ExportError``."""
    template = compiled(checkpoint)
    vocab = checkpoint.config.vocab_size
    return phone_text(checkpoint.tokenizer, template, checkpoint.eos_ids, vocab, where)


def compiled(checkpoint: Checkpoint) -> TemplateText:
    """Its chat template. Raises ``ExportError``."""
    origin = checkpoint.template_origin
    render = Template(checkpoint.tokenizer, checkpoint.chat_template, origin)
    return compile_template(render, origin)


def phone_text(
    source: PreTrainedTokenizerFast,
    template: TemplateText,
    eos_ids: Sequence[int],
    vocab: int,
    where: str,
) -> PhoneText:
    """The first rewriting of ``source``'s tokenizer that is proven; the file itself where it is.

    ``vocab``: rows of the model's embedding. Raises ``ExportError`` with what is wrong with each
    that was tried.
    """
    backend = source.backend_tokenizer
    raw = json.loads(backend.to_str())
    expected = HuggingFaceReading(backend, template)
    known = controls(raw, template)
    written = "\n".join(template.texts)
    if strange := [token for token in known if known[token]["id"] >= vocab and token in written]:
        raise ExportError(
            f"the chat template of {where} writes {', '.join(strange)}, which the model's "
            f"vocabulary of {vocab} tokens does not have: they are not of one model."
        )
    special = {content: token for content, token in known.items() if token["id"] < vocab}
    _check_end(template, special, eos_ids, source, where)
    promoted = [token["id"] for token in special.values() if not token["special"]]
    failures: dict[str, str] = {}  # what is wrong, and with which
    for candidate in candidates(raw, template, vocab):
        found = PhoneText(
            json.dumps(candidate.json, ensure_ascii=False, indent=2),
            m.Tokenizer(
                file=TOKENIZER,
                bos_id=_within(source.bos_token_id, vocab),
                eos_ids=tuple(eos_ids),
                pad_id=_within(source.pad_token_id, vocab),
                shown_ids=tuple(promoted),
                normalize=candidate.normalize,
                rewritten=candidate.rewritten,
                chat=chat_pieces(template, special, candidate.spaced),
            ),
            candidate.apart,
        )
        failed = expected.misread(found.tokenizer, found.chat_text(context=0), found.apart)
        if failed is None:
            return found
        which = f" (with {', '.join(candidate.rewritten)})" if failures else ""
        failures.setdefault(failed, which)
    tried = "; ".join(f"{failed}{which}" for failed, which in failures.items())
    raise ExportError(
        f"the tokenizer of {where} cannot go on a phone: {tried}. Give a checkpoint whose "
        f"tokenizer.json is byte-level BPE, or SentencePiece's as BPE."
    )


def _within(index: int | None, vocab: int) -> int | None:
    """None for a token that has no row in the embedding, and was dropped."""
    return index if index is not None and index < vocab else None


def _check_end(
    template: TemplateText,
    special: Mapping[str, AddedToken],
    eos_ids: Sequence[int],
    source: PreTrainedTokenizerFast,
    where: str,
) -> None:
    """Raises ``ExportError`` where an end token is none of the tokenizer's, or where the template
    writes none after the assistant's last words: no reply would learn to end."""
    names = dict(zip(eos_ids, source.convert_ids_to_tokens(list(eos_ids)), strict=True))
    if unknown := [index for index, name in names.items() if name is None]:
        raise ExportError(
            f"{where} names {', '.join(map(str, unknown))} as a token that ends a reply, which its "
            f"tokenizer does not have: correct eos_token_id in generation_config.json."
        )
    if not any(name in template.end for name in names.values()):
        written = [content for content in special if content in template.end]
        raise ExportError(
            f"the chat template of {where} ends the assistant's last words with "
            f"{', '.join(written) or 'no token'}, and a reply ends with "
            f"{', '.join(names.values())}: no reply would learn to end. Name the template's token "
            f"in eos_token_id of generation_config.json, or give another --chat-template FILE."
        )
