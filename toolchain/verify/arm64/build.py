"""Builds the runner, for ARM64 or for this machine, against ExecuTorch's published libraries.

What is built stays in a cache folder: the unpacked aarch64 wheel, and an executable for every
version of its sources, its compiler and ExecuTorch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from toolchain.verify.arm64 import attention

SOURCES = ("runner.cpp", "program.h", "request.h")
WHEEL_PLATFORM = "manylinux_2_28_aarch64"
COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
PACKAGES = "qemu-user-static g++-aarch64-linux-gnu libc6-dev-arm64-cross"

_DEFINES = ("C10_USING_CUSTOM_GENERATED_MACROS", "ET_EVENT_TRACER_ENABLED", "ET_USE_THREADPOOL")
_LIBRARIES = (
    "executorch",
    "executorch_threadpool",
    "executorch_kernels_optimized",
    "executorch_kernels_quantized",
    "executorch_backend_xnnpack",
)
_DOWNLOAD_S = 600.0
_COMPILE_S = 300.0


@dataclass(frozen=True)
class Runner:
    """An executable, and what it runs under where it is not of this machine's architecture."""

    executable: Path
    emulator: Path | None = None
    sysroot: Path | None = None  # where the emulator finds the ARM64 C library


class _CannotError(Exception):
    """The one sentence that says why there is no runner."""


def default_cache() -> Path:
    """``attune`` in the user's folder for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attune"


def prepare(native: bool = False, cache: Path | None = None) -> Runner | str:
    """The runner for ARM64 (``native``: for this machine), or one sentence why it cannot be had.

    Only the first call for a version of ExecuTorch needs the network, and none with ``native``.
    """
    folder = cache or default_cache()
    try:
        if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise _CannotError(
                f"the runner is built on Linux, on x86-64 or ARM64 processors; this is "
                f"{platform.system()} on {platform.machine()}."
            )
        folder.mkdir(parents=True, exist_ok=True)
        # On an ARM64 machine the installed ExecuTorch is the one to test, without an emulator.
        if native or platform.machine() == "aarch64":
            return Runner(_build(_find(("g++", "c++")), _installed("executorch"), folder, True))
        emulator, compiler = _find(EMULATORS), _find((COMPILER,))
        executable = _build(compiler, _wheel(folder), folder, False)
        return Runner(executable, emulator, _sysroot(compiler))
    except _CannotError as cannot:
        return str(cannot)
    except OSError as error:
        return f"the cache {folder} cannot be written: {error.strerror or error}."


def _find(names: Sequence[str]) -> Path:
    for name in names:
        if path := shutil.which(name):
            return Path(path)
    raise _CannotError(
        f"{' or '.join(names)} is not installed: on Debian, install {PACKAGES} (make debian), "
        "and g++ for the native runner."
    )


def _installed(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _CannotError(f"the Python package {package} is not installed: run make setup.")
    return Path(spec.submodule_search_locations[0])


def _output_of(command: Sequence[object], doing: str, timeout: float) -> str:
    """Standard output. A failure's reason is the first line of standard error that names one."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, "LC_ALL": "C"},  # reasons in English
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise _CannotError(f"{doing} took longer than {timeout:.0f} s.") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        telling = (
            [line for line in lines if "error" in line.lower()] or lines or ["no reason given"]
        )
        raise _CannotError(f"{doing} failed: {telling[-1].removeprefix('ERROR: ')}")
    return done.stdout


def _filled(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, which ``make`` fills where it is not there yet; whole or not at all."""
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(prefix=".part-", dir=target.parent) as scratch:
        part = Path(scratch, "part")
        part.mkdir()
        make(part)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another process has made the same
                raise
    return target


def _wheel(cache: Path) -> Path:
    """ExecuTorch's headers and ARM64 libraries, of the version that is installed here."""
    release = version("executorch").split("+")[0]

    def download(part: Path) -> None:
        pip = [sys.executable, "-m", "pip", "download", f"executorch=={release}", "--dest", part]
        options = ["--platform", WHEEL_PLATFORM, "--python-version", "3.11", "--no-deps"]
        options += ["--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=1"]
        doing = f"the download of ExecuTorch {release} for ARM64, which is needed once,"
        _output_of(pip + options, doing, _DOWNLOAD_S)
        for wheel in part.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                prefixes = tuple(f"executorch/{p}" for p in ("include/", "lib/", attention.LIBRARY))
                archive.extractall(part, [n for n in archive.namelist() if n.startswith(prefixes)])
            wheel.unlink()

    return _filled(cache / f"executorch-{release}-aarch64", download) / "executorch"


def _sysroot(compiler: Path) -> Path:
    """The folder whose ``lib`` has the ARM64 dynamic linker."""
    loader = "ld-linux-aarch64.so.1"
    command = [compiler, f"-print-file-name={loader}"]
    path = Path(_output_of(command, f"the search for {loader}", _COMPILE_S).strip()).resolve()
    if not path.is_file():
        raise _CannotError(f"{compiler.name} knows no {loader}: on Debian, install {PACKAGES}.")
    return path.parent.parent


def _build(compiler: Path, executorch: Path, cache: Path, native: bool) -> Path:
    """The executable, built unless this very one is in the cache."""
    here = Path(__file__).parent
    libraries = executorch / "lib"
    command: list[object] = [compiler, "-std=c++17", "-O2", here / SOURCES[0]]
    command += [f"-D{name}" for name in _DEFINES]
    for include in ("include", "include/executorch/runtime/core/portable_type/c10"):
        command += ["-isystem", executorch / include]
    # A library that only registers kernels or a delegate looks unused.
    command += ["-pthread", "-Wl,--no-as-needed", f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
    if native:
        # First, so that attention multiplies matrices with torch's BLAS, as under Python.
        torch = _installed("torch") / "lib"
        command += [f"-L{torch}", f"-Wl,-rpath,{torch}", "-ltorch_cpu", "-lc10"]
    command += [f"-l{name}" for name in _LIBRARIES]
    # The detached library's wrappers for PyTorch stay undefined.
    command += ["-Wl,--unresolved-symbols=ignore-in-shared-libs", "-Wl,-z,lazy"]
    command += ["-Wl,-rpath,$ORIGIN"]

    compiled_by = _output_of([compiler, "--version"], f"{compiler.name} --version", _COMPILE_S)
    texts = [*map(str, command), compiled_by, version("executorch"), version("torch")]
    parts = [text.encode() for text in texts]
    parts += [(here / name).read_bytes() for name in (*SOURCES, "attention.py")]
    key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def compile_to(part: Path) -> None:
        kernels = part / Path(attention.LIBRARY).name
        try:
            attention.detach(executorch / attention.LIBRARY, kernels)
        except (OSError, ValueError) as error:
            raise _CannotError(
                f"ExecuTorch's {kernels.name} cannot be used without libtorch: {error}."
            ) from error
        _output_of([*command, kernels, "-o", part / "runner"], "compiling the runner", _COMPILE_S)

    name = f"runner-{'native' if native else 'aarch64'}-{key[:16]}"
    return _filled(cache / name, compile_to) / "runner"
