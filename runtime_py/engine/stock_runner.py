"""A bundle's ``lm.pte`` in ExecuTorch's own ``TextLLMRunner``, unchanged, as an app has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import BundleError


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
        self.text = ChatText(bundle)
        tokenizer = bundle.path / manifest.tokenizer.file
        with silenced():
            self._runner = TextLLMRunner(
                str(android.lm), str(tokenizer), str(adapter or android.adapter)
            )

    def generate(
        self, prompt: str, count: int, temperature: float, stream: bool = False
    ) -> tuple[str, dict]:
        """At most ``count`` tokens of text after ``prompt`` (already rendered), and the runner's
        own statistics. ``temperature``: 0 is greedy. ``stream`` prints each piece as it comes.

        Raises ``BundleError`` for a prompt that leaves no room.
        """
        from executorch.extension.llm.runner import GenerationConfig

        if (length := len(self.text.encode(prompt))) >= self.context:
            raise BundleError(
                f"the prompt has {length} tokens, and the bundle's context ends at "
                f"{self.context}: give a shorter one, or export with a larger --context."
            )
        self._runner.reset()
        pieces: list[str] = []
        statistics: dict = {}

        def on_token(piece: str) -> None:
            if piece not in self.text.stops:
                pieces.append(piece)
                if stream:
                    terminal.write(piece)
                    terminal.flush()

        def on_stats(values: Any) -> None:
            statistics.update(json.loads(values.to_json_string()))

        config = GenerationConfig(echo=False, max_new_tokens=count, temperature=temperature)
        with silenced() as terminal:
            self._runner.generate(prompt, config, on_token, on_stats)
        return "".join(pieces), statistics
