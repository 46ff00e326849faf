"""llama.cpp as a yardstick: the same weights, rounded by its own quantizer to as many bits.

Needs the optional extra ``bench``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from exporters.errors import ExportError

# Our precision -> llama.cpp's file type of as many bits: its name and number (llama_ftype).
FORMATS = {"8da4w": ("Q4_0", 2), "8da8w": ("Q8_0", 7), "none": ("F32", 0)}
BATCH = 512  # tokens of a prompt in one call


def import_llama() -> ModuleType | str:
    """``llama_cpp``, without its log lines; or the reason why it cannot be had."""
    try:
        import llama_cpp
    except ModuleNotFoundError:
        return "llama-cpp-python is not installed: pip install 'attune-mobile[bench]'"
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    return llama_cpp


# Kept for the process's lifetime: llama.cpp holds its address.
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda level, text, data: None
)


def requantize(llama: ModuleType, source: Path, quantize: str, folder: Path) -> Path:
    """Writes a GGUF of ``source`` with the bits of ``quantize`` (see ``FORMATS``) into ``folder``.

    Raises ``ExportError`` where llama.cpp refuses the file.
    """
    name, kind = FORMATS[quantize]
    out = folder / f"{source.stem}.{name}.gguf"
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = kind
    parameters.allow_requantize = True
    code = llama.llama_model_quantize(
        str(source).encode(), str(out).encode(), ctypes.byref(parameters)
    )
    if code != 0 or not out.is_file():
        raise ExportError(
            f"llama.cpp cannot make a {name} of {source}: give another GGUF with --llama."
        )
    return out


class LlamaEngine:
    """A GGUF in llama.cpp, by its C interface: no sampling, no Python around a token."""

    def __init__(self, file: Path, name: str, context: int, threads: int) -> None:
        import llama_cpp as llama

        self.name = name
        self._llama = llama
        self._model = llama.llama_model_load_from_file(
            str(file).encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise ExportError(f"llama.cpp cannot load {file}: give another GGUF with --llama.")
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            llama.llama_model_free(self._model)
            raise ExportError(f"llama.cpp cannot run {file} with a context of {context} tokens.")

    def _read(self, tokens: Sequence[int]) -> None:
        array = (self._llama.llama_token * len(tokens))(*tokens)
        code = self._llama.llama_decode(
            self._context, self._llama.llama_batch_get_one(array, len(tokens))
        )
        if code != 0:
            raise ExportError(f"llama.cpp stopped with code {code}: the prompt may be too long.")
        self._llama.llama_get_logits(self._context)  # waits for them

    def prefill(self, tokens: Sequence[int]) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        for begin in range(0, len(tokens), BATCH):
            self._read(tokens[begin : begin + BATCH])

    def step(self, token: int) -> None:
        self._read([token])

    def close(self) -> None:
        """Frees what llama.cpp holds; the engine cannot be used afterwards."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)
