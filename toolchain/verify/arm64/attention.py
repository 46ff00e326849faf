"""The attention kernels that ExecuTorch ships, cut loose from libtorch.

``llama::custom_sdpa`` and ``llama::update_cache`` are compiled into one library of the wheel only,
``libcustom_ops_aot_lib.so``, beside wrappers for PyTorch that pull in libtorch and Python. The
kernels themselves call neither. ``detach`` writes a copy of the library that asks for neither at
load: its machine code is untouched, and a few entries of its ELF tables change.

1. A library that it needs for PyTorch's sake is needed no longer.
2. It looks up functions in itself first, as where Python opens it. Else it would multiply matrices
   with the function of the same name in ExecuTorch's other libraries, which rounds differently.
3. Its static initializers do not run: they only register kernels, in PyTorch and in ExecuTorch.
   Our runner registers the two kernels itself, by their C++ names.
4. PyTorch's variables may be undefined (weak). Undefined functions are no obstacle: they are
   looked up at the first call, and the wrappers are never called.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

LIBRARY = "extension/llm/custom_ops/libcustom_ops_aot_lib.so"
KERNELS = (b"custom_sdpa_out", b"update_cache_out")  # as they occur in the mangled names

_OURS = b"libexecutorch.so"
_UNWANTED = (b"_C.", b"libtorch", b"libc10.so")
_FOREIGN = (b"_ZN3c10", b"_ZN2at")  # mangled prefixes of PyTorch's namespaces c10 and at

# ELF-64, little endian: the fields that are read, as byte offsets (elf.h).
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NEEDED, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ = 1, 5, 6, 7, 8
_DT_SYMBOLIC, _DT_BIND_NOW, _DT_INIT_ARRAYSZ, _DT_FLAGS, _DT_FLAGS_1 = 16, 24, 27, 30, 0x6FFFFFFB
_RELA_BYTES, _SYMBOL_BYTES = 24, 24
_GLOBAL, _WEAK = 1, 2


class _Library:
    """The tables of a shared library that the dynamic linker reads."""

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)
        if self.bytes[:6] != b"\x7fELF\x02\x01":
            raise ValueError("it is not a 64-bit little-endian ELF file")
        (headers,) = struct.unpack_from("<Q", self.bytes, 32)
        size, count = struct.unpack_from("<HH", self.bytes, 54)
        self._loads = []  # (address, offset in the file, bytes in the file)
        self.dynamic: list[tuple[int, int, int]] = []  # (offset of the entry, tag, value)
        for at in (headers + size * i for i in range(count)):
            kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", self.bytes, at)
            if kind == _PT_LOAD:
                self._loads.append((address, offset, length))
            elif kind == _PT_DYNAMIC:
                entries = range(offset, offset + length, 16)
                self.dynamic = [(e, *struct.unpack_from("<QQ", self.bytes, e)) for e in entries]
        self._strings = self.offset(self.value(_DT_STRTAB))

    def value(self, tag: int) -> int:
        for _, other, value in self.dynamic:
            if other == tag:
                return value
        raise ValueError(f"its dynamic section lacks the entry {tag}")

    def offset(self, address: int) -> int:
        for start, offset, length in self._loads:
            if start <= address < start + length:
                return address - start + offset
        raise ValueError(f"the address {address:#x} is not in the file")

    def name(self, string: int) -> bytes:
        start = self._strings + string
        return bytes(self.bytes[start : self.bytes.index(0, start)])

    def variables(self) -> Iterator[tuple[bytes, int]]:
        """Undefined symbols that are bound at load: name, offset of the byte with its binding."""
        symbols, relocations = self.offset(self.value(_DT_SYMTAB)), self.value(_DT_RELA)
        first = self.offset(relocations)
        for at in range(first, first + self.value(_DT_RELASZ), _RELA_BYTES):
            (index,) = struct.unpack_from("<I", self.bytes, at + 12)
            symbol = symbols + index * _SYMBOL_BYTES
            name, _, _, section = struct.unpack_from("<IBBH", self.bytes, symbol)
            if index and section == 0:
                yield self.name(name), symbol + 4


def detach(source: Path, target: Path) -> None:
    """Writes the library ``source`` to ``target``, needing neither libtorch nor Python.

    Raises ``ValueError`` with the reason where the library is not built as expected.
    """
    content = source.read_bytes()
    missing = [kernel.decode() for kernel in KERNELS if kernel not in content]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}")
    try:
        library = _Library(content)
        _edit(library)
    except struct.error as error:
        raise ValueError("its tables are damaged") from error
    target.write_bytes(library.bytes)


def _edit(library: _Library) -> None:
    if any(tag in (_DT_BIND_NOW, _DT_FLAGS, _DT_FLAGS_1) for _, tag, _ in library.dynamic):
        raise ValueError("it may want every function at load")
    needed = {library.name(v): v for _, tag, v in library.dynamic if tag == _DT_NEEDED}
    if _OURS not in needed:
        raise ValueError(f"it does not need {_OURS.decode()}")
    symbolic = False
    for entry, tag, value in library.dynamic:
        if tag == _DT_NEEDED and library.name(value).startswith(_UNWANTED):
            # An entry cannot be left out; to need a library twice is the same as once.
            free = (_DT_NEEDED, needed[_OURS]) if symbolic else (_DT_SYMBOLIC, 0)
            struct.pack_into("<QQ", library.bytes, entry, *free)
            symbolic = True
        elif tag == _DT_INIT_ARRAYSZ:
            struct.pack_into("<Q", library.bytes, entry + 8, 0)
    for name, binding in library.variables():
        if name.startswith(_FOREIGN) and library.bytes[binding] >> 4 == _GLOBAL:
            library.bytes[binding] = _WEAK << 4 | library.bytes[binding] & 15
