"""``attune chat``: talk to a bundle's Android part, in ExecuTorch's stock LLM runner."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from runtime_py.bundle.bundle import Bundle, open_bundle
from runtime_py.bundle.manifest import Manifest
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import BundleError
from toolchain.report.console import console, print_json


class StockRunner:
    """A bundle's ``lm.pte`` in ExecuTorch's own ``TextLLMRunner``, unchanged."""

    def __init__(self, bundle: Bundle, adapter: Path | None = None) -> None:
        android, manifest = bundle.android, bundle.manifest
        # Importing registers the kernels that the runner looks up, and says so.
        with silenced():
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
            from executorch.extension.llm.runner import TextLLMRunner
            from executorch.kernels import quantized  # noqa: F401
        from transformers import PreTrainedTokenizerFast

        self.manifest = manifest
        file = bundle.path / manifest.tokenizer.file
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        special = {
            "bos_token": manifest.tokenizer.bos_id,
            "eos_token": manifest.tokenizer.eos_ids[0],
        }
        for name, index in special.items():  # chat templates write them out
            if index is not None:
                setattr(self.tokenizer, name, self.tokenizer.convert_ids_to_tokens(index))
        self.template = (bundle.path / manifest.tokenizer.chat_template).read_text(encoding="utf-8")
        data = adapter or android.adapter
        with silenced():
            self._runner = TextLLMRunner(str(android.lm), str(file), str(data))

    def render(self, messages: list[dict]) -> str:
        """The prompt that the chat template makes of a conversation, ready for a reply."""
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    def tokens(self, text: str) -> int:
        """How many tokens ``text`` (already rendered) has."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def generate(
        self,
        prompt: str,
        count: int,
        temperature: float,
        stream: bool = False,
    ) -> tuple[str, dict]:
        """Text after ``prompt`` (already rendered), and the runner's own statistics. ``stream``
        prints each piece as it comes. Raises ``BundleError`` for a prompt that leaves no room."""
        from executorch.extension.llm.runner import GenerationConfig

        context = self.manifest.model.context
        if (length := self.tokens(prompt)) >= context:
            raise BundleError(
                f"the prompt has {length} tokens, and the bundle's context ends at {context}: give "
                f"a shorter one, or export with a larger --context."
            )
        self._runner.reset()
        pieces: list[str] = []
        statistics: dict = {}
        stops = {self.tokenizer.convert_ids_to_tokens(i) for i in self.manifest.tokenizer.eos_ids}

        def token(piece: str) -> None:
            if piece not in stops:
                pieces.append(piece)
                if stream:
                    terminal.write(piece)
                    terminal.flush()

        def stats(values: Any) -> None:
            statistics.update(json.loads(values.to_json_string()))

        config = GenerationConfig(echo=False, max_new_tokens=count, temperature=temperature)
        with silenced() as terminal:
            self._runner.generate(prompt, config, token, stats)
        return "".join(pieces), statistics


def chat(
    bundle: Annotated[Path, typer.Argument(help="A bundle with an Android part.")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this one message and end; else a conversation.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Another adapter: a .ptd file or a PEFT folder.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens a reply.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Talk to the Android part on this machine, in the stock runner, streaming.

    Example: [bold]attune chat out/tiny --prompt "I need a hotel in Paris."[/]
    """
    opened = open_bundle(bundle)
    if as_json and prompt is None:
        raise BundleError("--json answers one message: give it with --prompt.")
    with _runtime_adapter(opened.manifest, adapter) as file:
        runner = StockRunner(opened, file)
        if prompt is not None:
            _once(runner, prompt, max_new_tokens, temperature, as_json)
            return
        _converse(runner, opened.manifest, max_new_tokens, temperature)


@contextmanager
def _runtime_adapter(manifest: Manifest, adapter: Path | None) -> Iterator[Path | None]:
    """The adapter as a .ptd file for this bundle: checked, and converted where it is PEFT's."""
    if adapter is None:
        yield None
        return
    from runtime_py.bundle.adapter_forms import load_adapter, to_runtime
    from runtime_py.bundle.flat_tensor import write_ptd

    with tempfile.TemporaryDirectory(prefix="attune-") as folder:
        file = Path(folder) / "adapter.ptd"
        write_ptd(file, to_runtime(load_adapter(adapter), manifest.adapter.tensors))
        yield file


def _once(runner: StockRunner, prompt: str, count: int, temperature: float, as_json: bool) -> None:
    rendered = runner.render([{"role": "user", "content": prompt}])
    reply, statistics = runner.generate(rendered, count, temperature, stream=not as_json)
    if as_json:
        print_json({"prompt": prompt, "rendered": rendered, "reply": reply, "stats": statistics})
    else:
        print(flush=True)


def _converse(runner: StockRunner, manifest: Manifest, count: int, temperature: float) -> None:
    console.print(
        f"[bold]{manifest.model.name}[/] in ExecuTorch's stock runner. Ctrl-D ends, /new forgets."
    )
    messages: list[dict] = []
    while True:
        try:
            said = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if said == "/new":
            messages = []
            continue
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        rendered = runner.render(messages)
        while len(messages) > 1 and runner.tokens(rendered) + count > manifest.model.context:
            messages = messages[2:]
            rendered = runner.render(messages)
        try:
            reply, statistics = runner.generate(rendered, count, temperature, stream=True)
        except BundleError as error:  # this message alone is too long: the conversation goes on
            console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            messages.pop()
            continue
        print(flush=True)
        messages.append({"role": "assistant", "content": reply})
        if rate := _rate(statistics):
            console.print(f"[dim]{rate:.0f} tokens/s[/]")


def _rate(statistics: dict) -> float | None:
    try:
        spent = statistics["inference_end_ms"] - statistics["first_token_ms"]
        return 1000.0 * (statistics["generated_tokens"] - 1) / spent if spent > 0 else None
    except KeyError:
        return None
