"""The general text: as much as it must be, mixed, foreign to all other data, and drawn again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from exporters.model.spec import read_spec
from runtime_py.bundle.bundle import Bundle
from runtime_py.bundle.chat_text import ChatText
from runtime_py.bundle.general_text import read_general, read_replay
from runtime_py.bundle.manifest import Manifest, list_files
from runtime_py.engine.retention import general_examples
from runtime_py.loop.errors import BundleError
from runtime_py.loop.stream import read_dialogues
from tests.tiny import config_of, paper_bundle
from toolchain.compile import shipped_general
from toolchain.compile.builtin import recipe
from toolchain.compile.export_input import builtin_folder
from toolchain.compile.general_ids import general_ids

CORPUS = Path(__file__).parents[4] / "shared" / "data" / "corpus"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The built-in model's tokenizer and template, with the general text, and no program."""
    spec = read_spec(config_of("llama"), 48)
    folder = paper_bundle(tmp_path_factory.mktemp("general"), spec, ["q_proj"], 2)
    model = builtin_folder()
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    general, replay = shipped_general.write_general(folder)
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    policy = manifest.policy.model_copy(update={"general": general, "replay": replay})
    files = list_files(folder)
    return Bundle(folder, manifest.model_copy(update={"policy": policy, "files": files}))


def test_enough_of_both_kinds_from_the_first_tokens_on(bundle: Bundle) -> None:
    texts, text = read_general(bundle), ChatText.of(bundle)
    kind = {one.id: bool(one.turns) for one in texts}
    every = general_examples(texts, text, 256, 1 << 30)
    assert sum(one.count for one in every) >= 20_000
    first = general_examples(texts, text, 256, 2048)
    assert sum(one.count for one in first) == 2048
    chat = sum(one.count for one in first if kind[one.id])
    assert 0.3 < chat / 2048 < 0.7


def test_every_id_says_where_it_is_from_and_none_is_twice(bundle: Bundle) -> None:
    measured = [one.id for one in read_general(bundle)]
    replayed = [one.id for one in read_replay(bundle)]
    assert len({*measured, *replayed}) == len(measured) + len(replayed)
    assert {id.partition("-")[0] for id in measured} == {"sgd", "mts_dialog"}
    assert {id.partition("-")[0] for id in replayed} == {"sgd"}
    assert general_ids() == {*measured, *replayed}
    terms = (bundle.path / "general" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for name in ("Schema-Guided Dialogue", "MTS-Dialog", "CC BY-SA 4.0", "CC BY 4.0"):
        assert name in terms


def test_the_built_in_texts_are_others(bundle: Bundle) -> None:
    """Neither what an export calibrates on nor what the demo shows."""
    own = {" ".join(turn.content for turn in d.turns) for d in read_replay(bundle)}
    own |= {" ".join(turn.content for turn in one.turns) for one in read_general(bundle)}
    data = Path(shipped_general.__file__).parent / "data"
    for line in (data / "text.jsonl").read_text(encoding="utf-8").splitlines():
        assert " ".join(turn["content"] for turn in json.loads(line)["turns"]) not in own
    for dialogue in read_dialogues(data / "demo_stream.jsonl"):
        assert " ".join(turn.content for turn in dialogue.turns) not in own


def test_a_bundle_without_it_says_so(bundle: Bundle) -> None:
    policy = bundle.manifest.policy.model_copy(update={"general": None, "replay": None})
    bare = Bundle(bundle.path, bundle.manifest.model_copy(update={"policy": policy}))
    with pytest.raises(BundleError, match="has no general text: export it anew"):
        read_general(bare)
    with pytest.raises(BundleError, match="has no dialogues to replay"):
        read_replay(bare)


@pytest.mark.full
@pytest.mark.skipif(not CORPUS.is_dir(), reason="needs the corpus in ../shared")
def test_the_recipe_draws_what_ships_and_the_built_in_model_has_not_seen_it() -> None:
    data = Path(shipped_general.__file__).parent / "data"
    for name, rows in zip(
        (shipped_general.GENERAL, shipped_general.REPLAY), shipped_general.draw(CORPUS), strict=True
    ):
        packed = gzip.decompress((data / f"general_{name}.gz").read_bytes())
        assert [json.loads(line) for line in packed.decode().split("\n") if line] == rows
    training, validation = recipe.read_corpus(CORPUS)
    seen = {json.dumps(turns) for turns in training}
    seen |= {json.dumps(turns) for rows in validation.values() for turns in rows}
    measured, replayed = shipped_general.draw(CORPUS)
    for row in (*measured, *replayed):
        if "turns" in row:
            assert json.dumps(row["turns"]) not in seen
    transcripts = {shipped_general._transcript({"turns": json.loads(turns)}) for turns in seen}
    assert not transcripts & {row["text"] for row in measured if "text" in row}
