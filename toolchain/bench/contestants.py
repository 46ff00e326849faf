"""The engines of one benchmark: those that can be had, and for the others the reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from exporters.executorch.lm_program import lower_lm
from runtime_py.bundle.bundle import Bundle
from runtime_py.engine.native import silenced
from runtime_py.loop.errors import BundleError
from toolchain.bench.engines import BundleEngine, GenerationEngine, TorchEngine
from toolchain.bench.generation_report import ADAPTER_COST, BUNDLE, LLAMA, TORCH, WITHOUT
from toolchain.bench.llama import FORMATS, LlamaEngine, import_llama, requantize
from toolchain.compile.android import PREFILL_ANDROID
from toolchain.compile.source import CheckpointSource, as_in_bundle, find_source, float_model
from toolchain.report.console import Stages


class Contestants:
    """Makes what is dear (models, files) once, and engines for each number of threads.

    ``folder`` holds the files it makes. ``reasons``: row or figure -> why it is absent.
    """

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        *,
        source: str | None,
        llama: Path | None,
        adapter_cost: bool,
        quiet: bool,
    ) -> None:
        if llama is not None and not llama.is_file():
            raise BundleError(f"there is no file {llama}: give a GGUF with --llama.")
        self._bundle, self._folder = bundle, folder
        self._files = bundle.android
        self.reasons: dict[str, str] = {}
        with Stages(f"bench {bundle.path.name}", quiet=quiet) as stages:
            stages("read the source")
            original = find_source(bundle.manifest, source)
            self._torch: PreTrainedModel | None = None
            if isinstance(original, str):
                self.reasons[TORCH] = original
            else:
                self._torch = original.checkpoint.hf_model()
            self._llama = self._gguf(original, llama, stages)
            self._without = self._program_without(original, adapter_cost, stages)

    def _gguf(
        self, source: CheckpointSource | str, given: Path | None, stages: Callable[[str], None]
    ) -> Path | None:
        file = given or (None if isinstance(source, str) else source.gguf)
        llama = import_llama()
        if isinstance(llama, str):
            self.reasons[LLAMA] = llama
            return None
        if file is None:
            other = "the source is no GGUF file: name one of the same model with --llama"
            self.reasons[LLAMA] = source if isinstance(source, str) else other
            return None
        quantize = self._files.quantize
        stages(f"llama.cpp: round {file.name} to {FORMATS[quantize][0]}")
        with silenced():
            return requantize(llama, file, quantize, self._folder)

    def _program_without(
        self, source: CheckpointSource | str, wanted: bool, stages: Callable[[str], None]
    ) -> Path | None:
        if not wanted:
            self.reasons[ADAPTER_COST] = "not measured: give --adapter-cost"
            return None
        if isinstance(source, str):
            self.reasons[ADAPTER_COST] = source
            return None
        stages("lower the model without LoRA")
        return lower_without_adapter(self._bundle, source, self._folder / "without.pte")

    @contextmanager
    def engines(self, threads: int) -> Iterator[dict[str, GenerationEngine]]:
        """All engines with so many threads, in the order of a round; they end with the context.

        PyTorch's number of threads is the caller's to set.
        """
        quantize, engines = self._files.quantize, dict[str, GenerationEngine]()
        with ExitStack() as ends:
            ends.callback(engines.clear)
            with silenced():
                engines[BUNDLE] = BundleEngine(
                    f"attune {quantize}", self._files.lm, self._files.adapter, threads
                )
                if self._without is not None:
                    engines[WITHOUT] = BundleEngine(
                        f"attune {quantize}, no adapter", self._without, None
                    )
            if self._torch is not None:
                engines[TORCH] = TorchEngine(self._torch)
            if self._llama is not None:
                context = self._bundle.manifest.model.context
                name = f"llama.cpp {FORMATS[quantize][0]}"
                engine = LlamaEngine(self._llama, name, context, threads)
                ends.callback(engine.close)
                engines[LLAMA] = engine
            yield engines


def lower_without_adapter(bundle: Bundle, source: CheckpointSource, out: Path) -> Path:
    """Writes the bundle's ``lm.pte`` as it were without LoRA, for comparison."""
    manifest = bundle.manifest
    model = as_in_bundle(float_model(manifest, source, adapted=False), bundle, source)
    eos = list(source.checkpoint.eos_ids)
    lower_lm(
        model,
        out,
        prefill_length=PREFILL_ANDROID,
        embed_length=manifest.policy.embed_length,
        bos_id=manifest.tokenizer.bos_id if manifest.tokenizer.bos_id is not None else eos[0],
        eos_ids=eos,
    )
    return out
