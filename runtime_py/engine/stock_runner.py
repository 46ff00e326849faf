"""A bundle's ``lm.pte`` in ExecuTorch's own ``TextLLMRunner``, unchanged, as an app has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import BundleError

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


class StockRunner:
    """``adapter``: a .ptd file in place of the bundle's own. ``text`` renders and counts."""

    def __init__(self, bundle: Bundle, adapter: Path | None = None) -> None:
        android, manifest = bundle.android, bundle.manifest
        # Importing registers the kernels that the runner looks up, and says so.
        with silenced():
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
            from executorch.extension.llm.runner import TextLLMRunner
            from executorch.kernels import quantized  # noqa: F401

        self.context = manifest.model.context
        self.text = ChatText.of(bundle)
        self._folder = TemporaryDirectory(prefix="attune-")
        tokenizer = Path(self._folder.name) / "tokenizer.json"
        tokenizer.write_text(_undecoded(bundle.path / manifest.tokenizer.file), encoding="utf-8")
        with silenced():
            self._runner = TextLLMRunner(
                str(android.lm), str(tokenizer), str(adapter or android.adapter)
            )

    def generate(
        self,
        prompt: str,
        count: int,
        temperature: float,
        stream: Callable[[str], str] | None = None,
    ) -> tuple[str, dict]:
        """At most ``count`` tokens of text after ``prompt`` (``ChatText.for_runner``'s), and the
        runner's own statistics. ``temperature``: 0 is greedy. Every character is printed as soon as
        all its bytes are there, as ``stream`` gives it; None: nothing is.

        Raises ``BundleError`` for a prompt that leaves no room.
        """
        from executorch.extension.llm.runner import GenerationConfig

        if (length := len(self.text.read_by_runner(prompt))) >= self.context:
            raise BundleError(
                f"the prompt has {length} tokens, and the bundle's context ends at "
                f"{self.context}: give a shorter one, or export with a larger --context."
            )
        self._runner.reset()
        ids: list[int] = []
        statistics: dict = {}
        shown = 0

        def show(text: str) -> None:
            nonlocal shown
            if stream is not None:
                terminal.write(stream(text[shown:]))
            terminal.flush()
            shown = len(text)

        def on_token(token: str) -> None:
            index = self.text.tokenizer.token_to_id(token)
            if index is None or token in self.text.stops:
                return
            ids.append(index)
            if not (text := self.text.decode(ids)).endswith(_UNFINISHED):
                show(text)

        def on_stats(values: Any) -> None:
            statistics.update(json.loads(values.to_json_string()))

        config = GenerationConfig(echo=False, max_new_tokens=count, temperature=temperature)
        with silenced() as terminal:
            self._runner.generate(prompt, config, on_token, on_stats)
            text = self.text.decode(ids)
            show(text)
        return text, statistics


def _undecoded(tokenizer: Path) -> str:
    """The file's text without its decoder: the runner then names each token as the vocabulary does,
    where Python would get the bytes of half a character as text, which they are not."""
    return json.dumps(json.loads(tokenizer.read_bytes()) | {"decoder": None}, ensure_ascii=False)
