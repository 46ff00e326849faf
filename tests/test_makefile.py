"""What ``make`` installs: torch from where ``TORCH_INDEX`` says, without a network."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VERSION = next(
    line.removeprefix("torch==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def wheel(folder: Path, version: str, says: str) -> None:
    """A package of a few bytes that is called torch."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": f"origin = {says!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record.append(f"{name},sha256={digest.decode()},{len(text.encode())}\n")
    files[f"{info}/RECORD"] = "".join(record) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def make(venv: Path, default: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``make torch`` into ``venv``; pip's own configuration knows nothing but ``default``."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "MAKE", "PYTHONPATH")) and name != "MFLAGS"
    }
    environment |= {"PIP_INDEX_URL": default.as_uri(), "PIP_CONFIG_FILE": os.devnull}
    command = ["make", "torch", f"VENV={venv}", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def origin(venv: Path) -> str:
    code = "import torch; print(torch.origin)"
    done = subprocess.run(
        [venv / "bin" / "python", "-I", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index in which torch is what pip takes by default."""
    index = tmp_path_factory.mktemp("default")
    wheel(index / "torch", VERSION, "default")
    _list(index / "torch")
    return index


def _list(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.whl"))
    links = "".join(f'<a href="{name}">{name}</a>' for name in names)
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One environment for all cases: each installs over the other."""
    return tmp_path_factory.mktemp("venv") / ".venv"


@pytest.mark.parametrize("version", [VERSION, f"{VERSION}+cpu"])
@pytest.mark.parametrize("kind", ["folder", "index"])
def test_torch_comes_from_where_it_is_told(
    kind: str, version: str, venv: Path, default: Path, tmp_path: Path
) -> None:
    """Even where pip's default has the same version."""
    wheels = tmp_path / "torch"
    wheel(wheels, version, kind)
    _list(wheels)
    place = wheels if kind == "folder" else tmp_path.as_uri()
    done = make(venv, default, f"TORCH_INDEX={place}")
    assert done.returncode == 0, done.stderr
    assert origin(venv) == kind
    assert "1 of 2" in done.stdout
    uninstall(venv)


def test_torch_comes_from_pips_default(venv: Path, default: Path) -> None:
    done = make(venv, default)
    assert done.returncode == 0, done.stderr
    assert origin(venv) == "default"
    uninstall(venv)


def uninstall(venv: Path) -> None:
    subprocess.run([venv / "bin" / "pip", "uninstall", "-qy", "torch"], check=True)


def test_a_place_that_is_not_there(venv: Path, default: Path, tmp_path: Path) -> None:
    done = make(venv, default, f"TORCH_INDEX={tmp_path / 'none'}")
    assert done.returncode != 0
    assert "TORCH_INDEX is neither a URL nor a folder" in done.stdout
