"""The general text that ships in every bundle, and the recipe that drew it.

    python -m toolchain.compile.shipped_general --corpus DIR

draws it again into ``data/``: ``DIR`` holds the gzip JSONL files named below (docs/bundle.md,
"General text"). Forgetting is measured on it, so no model here was trained on it and no other set
of attune has a dialogue of it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from runtime_py.loop.dialogue import Dialogue, Turn, check
from runtime_py.loop.errors import LoopError
from toolchain.compile.builtin.recipe import SOURCES, held_out
from toolchain.compile.general_ids import GENERAL, REPLAY, packed

FOLDER = "general"  # in a bundle
ATTRIBUTION = "ATTRIBUTION.md"
CHATS, REPLAYED = 72, 128  # SGD dialogues that are measured on, and that are trained on
CHAT_WORDS = (60, 160)  # of such a dialogue
TRANSCRIPTS = 20  # of MTS-Dialog, as plain text
SPEAKERS = {"assistant": "Doctor", "user": "Patient"}


def write_general(folder: Path) -> tuple[str, str]:
    """Unpacks the text into the bundle ``folder``; the paths of what is measured and replayed."""
    (folder / FOLDER).mkdir()
    data = files("toolchain.compile").joinpath("data")
    for name in (GENERAL, REPLAY):
        (folder / FOLDER / name).write_bytes(gzip.decompress(packed(name)))
    source = data.joinpath("general_ATTRIBUTION.md")
    (folder / FOLDER / ATTRIBUTION).write_bytes(source.read_bytes())
    return f"{FOLDER}/{GENERAL}", f"{FOLDER}/{REPLAY}"


def draw(corpus: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of both files: ``id`` with ``turns`` or with ``text``. Which ones is decided by the
    hash of their ids, among those that the built-in model neither learnt nor is judged by."""
    chats, transcripts = [], []
    for name, most, words, _ in SOURCES:
        if name.startswith("sgd"):
            chats = [row for row in _left(corpus / name, most, words) if _is_chat(row)]
        elif name.startswith("mts"):
            transcripts = list(_left(corpus / name, most, words))
    chats.sort(key=_rank)
    transcripts.sort(key=_rank)
    plain = [{"id": row["id"], "text": _transcript(row)} for row in transcripts[:TRANSCRIPTS]]
    talk = [{"id": row["id"], "turns": row["turns"]} for row in chats[: CHATS + REPLAYED]]
    return _mixed(talk[:CHATS], plain), talk[CHATS:]


def _left(path: Path, most: int, words: int) -> Iterator[dict[str, Any]]:
    """What ``recipe.read_corpus`` neither trains on nor holds out."""
    kept = 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            row["turns"] = [
                {"role": t["role"], "content": t["content"].strip()} for t in row["turns"]
            ]
            if _words(row) > words:
                yield row
            elif not held_out(row["id"]):
                kept += 1
                if kept > most:
                    yield row


def _words(row: dict[str, Any]) -> int:
    return sum(len(turn["content"].split()) for turn in row["turns"])


def _is_chat(row: dict[str, Any]) -> bool:
    try:
        check(Dialogue(row["id"], tuple(Turn(t["role"], t["content"]) for t in row["turns"])))
    except LoopError:
        return False
    return CHAT_WORDS[0] <= _words(row) <= CHAT_WORDS[1]


def _rank(row: dict[str, Any]) -> bytes:
    return hashlib.sha256(f"general {row['id']}".encode()).digest()


def _transcript(row: dict[str, Any]) -> str:
    return "\n".join(f"{SPEAKERS[turn['role']]}: {turn['content']}" for turn in row["turns"])


def _mixed(chats: Sequence[dict], plain: Sequence[dict]) -> list[dict[str, Any]]:
    """Both kinds evenly, so that every beginning of the file has both."""
    whole = [((n + 0.5) / len(rows), row) for rows in (chats, plain) for n, row in enumerate(rows)]
    return [row for _, row in sorted(whole, key=lambda pair: pair[0])]


def main() -> None:
    """The command line: writes the two files anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    args = parser.parse_args()
    for name, rows in zip((GENERAL, REPLAY), draw(args.corpus), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # No time and no name in the header: the same rows are the same bytes.
        packed = gzip.compress(text.encode(), mtime=0)
        (args.out / f"general_{name}.gz").write_bytes(packed)
        print(f"{name}: {len(rows)} rows, {len(text):,} characters, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
