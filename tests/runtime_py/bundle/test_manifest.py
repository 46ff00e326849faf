"""A bundle is used only if every byte of it is the one that was exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import open_bundle
from runtime_py.bundle.manifest import CHECKSUM, MANIFEST, SCHEMA_VERSION, File, Manifest
from runtime_py.loop.errors import BundleError
from runtime_py.loop.files import sha256
from tests import tiny

TARGETS = ["q_proj"]


def paper(folder: Path) -> Path:
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    return tiny.paper_bundle(folder, spec, TARGETS, 2)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return paper(tmp_path / "bundle")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the cases of a property, each of which leaves it as it was."""
    return paper(tmp_path_factory.mktemp("whole") / "bundle")


def refused(bundle: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert message.endswith(".")


def rewritten(bundle: Path, change: Callable[[dict], object]) -> None:
    """Changes the manifest and signs it anew, as a program with a mistake would."""
    value = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    change(value)
    (bundle / MANIFEST).write_text(json.dumps(value), encoding="utf-8")
    (bundle / CHECKSUM).write_text(sha256(bundle / MANIFEST) + "\n")


def test_what_was_written_is_read(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert Manifest.model_validate_json((bundle / MANIFEST).read_bytes()) == manifest
    assert manifest.model.name == "paper"
    assert manifest.android is not None
    assert manifest.android.programs[0].inputs[0].shape == (1, "1..16")
    assert [f.path for f in manifest.files] == sorted(
        p.relative_to(bundle).as_posix()
        for p in bundle.rglob("*")
        if p.is_file() and p.name not in (MANIFEST, CHECKSUM)
    )


# Damage

FILES = [
    MANIFEST,
    CHECKSUM,
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "android/adapter.ptd",
    "android/lm.pte",
    "tokenizer.json",
]


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(FILES), place=st.integers(0, 2**31), mask=st.integers(1, 255))
def test_any_changed_byte_is_refused_and_its_file_named(
    whole: Path, name: str, place: int, mask: int
) -> None:
    path = whole / name
    original = path.read_bytes()
    changed = bytearray(original)
    changed[place % len(original)] ^= mask
    path.write_bytes(changed)
    try:
        refused(whole, name)
    finally:
        path.write_bytes(original)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(FILES), keep=st.floats(0, 0.999), more=st.binary(max_size=3))
def test_any_shorter_or_longer_file_is_refused_and_named(
    whole: Path, name: str, keep: float, more: bytes
) -> None:
    path = whole / name
    original = path.read_bytes()
    path.write_bytes(original + more if more else original[: int(keep * len(original))])
    try:
        refused(whole, name)
    finally:
        path.write_bytes(original)


def test_every_byte_of_the_checksum_counts(bundle: Path) -> None:
    path = bundle / CHECKSUM
    original = path.read_bytes()
    assert len(original) == 65
    for place in range(len(original)):
        for bit in range(8):
            changed = bytearray(original)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            refused(bundle, CHECKSUM)


def test_missing_and_unlisted_files_are_all_named(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "android/lm.pte").unlink()
    (bundle / "android/lm.pte.bak").write_bytes(b"x")
    (bundle / "deep/er").mkdir(parents=True)
    (bundle / "deep/er/manifest.json").write_bytes(b"{}")
    refused(
        bundle,
        "tokenizer.json is missing",
        "android/lm.pte is missing",
        "android/lm.pte.bak is not in the manifest",
        "deep/er/manifest.json is not in the manifest",
    )


def test_a_folder_in_the_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    refused(bundle, "tokenizer.json is missing")


def test_without_manifest_or_checksum_it_is_no_bundle(bundle: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "no bundle at")
    (bundle / CHECKSUM).unlink()
    refused(bundle, CHECKSUM)
    (bundle / MANIFEST).unlink()
    refused(bundle, f"no {MANIFEST}")
    (tmp_path / "file").write_bytes(b"")
    refused(tmp_path / "file", "no bundle at")


# The schema: the signature is right, and what is signed is not


def nodes(value: object, path: tuple = ()) -> list[tuple]:
    """Paths of every object in a JSON value."""
    found = [path] if isinstance(value, dict) else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            found += nodes(inner, (*path, key))
    return found


def test_an_unknown_key_anywhere_is_an_error(bundle: Path) -> None:
    original = (bundle / MANIFEST).read_text(encoding="utf-8")
    # Names to values; the loop's are told in words of its own.
    free = {("versions",), ("android", "programs", 0, "not_delegated"), ("policy", "loop")}
    places = [p for p in nodes(json.loads(original)) if p not in free]
    assert len(places) > 15
    for place in places:
        (bundle / MANIFEST).write_text(original, encoding="utf-8")

        def add(value: dict, place: tuple = place) -> None:
            for key in place:
                value = value[key]
            value["surprise"] = 1

        rewritten(bundle, add)
        refused(bundle, MANIFEST, ".".join(map(str, (*place, "surprise"))), "Extra inputs")


def test_an_unknown_choice_of_the_loop_is_an_error(bundle: Path) -> None:
    rewritten(bundle, lambda m: m["policy"]["loop"].update(surprise=1))
    refused(bundle, MANIFEST, "policy.loop", "unknown fields: surprise")


def test_a_missing_key_is_an_error(bundle: Path) -> None:
    rewritten(bundle, lambda m: m["tokenizer"].pop("eos_ids"))
    refused(bundle, "tokenizer.eos_ids", "required")


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, "1", None])
def test_another_schema_version_is_refused(bundle: Path, version: object) -> None:
    rewritten(bundle, lambda m: m.update(schema_version=version))
    refused(bundle, f"schema version {version}", f"reads {SCHEMA_VERSION}")


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "null"])
def test_a_manifest_that_is_no_object_is_refused(bundle: Path, content: str) -> None:
    (bundle / MANIFEST).write_text(content)
    (bundle / CHECKSUM).write_text(sha256(bundle / MANIFEST) + "\n")
    refused(bundle, MANIFEST)


@pytest.mark.parametrize("path", ["/etc/hostname", "../x", "a/../../x", "adapter/../../x"])
def test_a_path_outside_is_refused(bundle: Path, path: str) -> None:
    with pytest.raises(ValidationError, match="stay inside"):
        File(path=path, bytes=1, sha256="0" * 64)
    rewritten(bundle, lambda m: m["files"][0].update(path=path))
    refused(bundle, "files.0.path", "stay inside")


@pytest.mark.parametrize(
    ("where", "key"),
    [
        (("tokenizer",), "file"),
        (("adapter",), "peft"),
        (("adapter",), "runtime"),
        (("android", "programs", 0), "file"),
    ],
)
@pytest.mark.parametrize("value", ["../outside.json", "/etc/hostname", "android/other", "lm"])
def test_only_checked_files_are_named(bundle: Path, where: tuple, key: str, value: str) -> None:
    """What a host will open is among the files whose hashes were compared."""
    (bundle.parent / "outside.json").write_text("{}")

    def point(manifest: dict) -> None:
        part = manifest
        for step in where:
            part = part[step]
        part[key] = value

    rewritten(bundle, point)
    refused(bundle, value, "files")
