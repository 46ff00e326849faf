"""A bundle of a tiny random model that the study can use: weights and texts, and no program."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from exporters.model.assembly import build
from exporters.model.spec import read_spec
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_forms import to_runtime
from runtime_py.bundle.bundle import MEAN_VECTOR
from runtime_py.bundle.flat_tensor import locate, write_ptd
from runtime_py.bundle.peft_config import fresh_config
from tests import tiny
from toolchain.compile.adapter_layout import fresh
from toolchain.compile.training_part import training_spec, write_training

TARGETS, RANK = ("q_proj", "k_proj", "v_proj"), 4
SIZE = {"vocab_size": 320, "max_position_embeddings": 512}
CONTEXT, LENGTHS = 512, (64, 192)
LOOP: dict[str, bool | int | float | str] = {
    "bins": 8, "bin_bytes": 4096, "paraphrases": 0, "selection": "random", "forgetting_tokens": 48,
    "fewest_steps": 2, "most_steps": 4, "batch": 2,
}  # fmt: skip


def tiny_bundle(folder: Path) -> Path:
    theirs = tiny.hugging_face("llama", **SIZE)
    spec = read_spec(theirs.config, CONTEXT)
    model = build(spec, theirs.state_dict())
    tiny.paper_bundle(folder, spec, TARGETS, RANK)
    theirs.config.save_pretrained(folder)
    tiny.bpe(320).save(str(folder / "tokenizer.json"))
    known = m.Manifest.model_validate_json((folder / m.MANIFEST).read_bytes())
    config = fresh_config(RANK, 8.0, TARGETS, "tiny")
    adapter = fresh(spec, config, TARGETS, RANK)
    write_ptd(folder / "android/adapter.ptd", to_runtime(adapter, known.adapter.tensors))
    np.linspace(-1, 1, spec.hidden, dtype="<f4").tofile(folder / MEAN_VECTOR)
    texts = [
        {"id": f"g{i}", "text": "the cat sat on the mat and then the other " * 2} for i in (1, 2)
    ]
    (folder / "general.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    training = write_training(folder, model, training_spec(model, TARGETS, RANK, "fp32"), LENGTHS)
    policy = m.Policy(embed_length=192, loop=LOOP, general="general.jsonl")
    (folder / m.CHECKSUM).unlink()
    (folder / m.MANIFEST).unlink()
    offsets = locate(folder / "android/adapter.ptd")
    placed = [t.model_copy(update={"offset": offsets[t.name]}) for t in known.adapter.tensors]
    own = known.adapter.model_copy(update={"tensors": tuple(placed)})
    changed = {
        "adapter": own,
        "policy": policy,
        "training": training,
        "files": m.list_files(folder),
    }
    m.write_manifest(folder, known.model_copy(update=changed))
    return folder
