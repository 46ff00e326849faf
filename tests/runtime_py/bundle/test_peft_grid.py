"""Every combination of the fields that select modules: PEFT's own update of the weights, or none.

PEFT drops a tensor that its configuration does not select without a word, and attune refuses it:
so each combination is tried with the tensors that PEFT would save, which must give PEFT's update,
and with those of all linear layers, which must give it too or be refused.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from runtime_py.bundle.adapter_folder import CONFIG, WEIGHTS
from runtime_py.bundle.peft_adapter import PeftAdapter, check_fits, read_peft
from runtime_py.loop.errors import AdapterError
from tests import tiny
from toolchain.compile.tolerances import rounding

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 32}
Q1, DOWN2 = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
TARGETS: list = [
    ["q_proj", "v_proj"],
    ["o_proj", "down_proj"],
    ["self_attn.q_proj", "1.mlp.up_proj", "proj"],
    [Q1, DOWN2, "v_proj"],
    ["lm_head", "q_proj"],
    ["nothing"],
    [],
    None,
    r".*\.(q|v)_proj",
    r"model\.layers\.[02]\.self_attn\.[qkvo]+_proj",
    r"^(?!.*layers\.1\.).*mlp\.(?:up|down)_proj$",
    r"(q_proj|v_proj)",
    r".*self_attn.*",
    "all-linear",
    "ALL-linear",
]
EXCLUDED: list = [None, [], ["v_proj"], [DOWN2, "1.self_attn.q_proj"], r".*layers\.0\..*", ".*"]
LAYERS: list = [None, [], 1, [0, 2], [7], -1]
PATTERNS: list = [None, [], "", "layers", ["h", "layers"], ["self_attn"], "model.layers"]
RANKS: list = [{}, {"q_proj": 2, r".*\.2\..*": 3}, {Q1: 5, "self_attn.v_proj": 1, "layers": 7}]
ALPHAS: list = [{}, {"v_proj": 3, r"layers\.[01]\..*": 10}, {f"^{DOWN2}$": 0.5, "proj": 9}]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.hugging_face(request.param, **SMALL)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def _peft_update(base: PreTrainedModel, folder: Path) -> dict[str, np.ndarray] | None:
    """Merged weight minus base of every linear layer; None where PEFT does not load it."""
    try:
        peft = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return None
    merged = dict(_linears(peft.merge_and_unload()))
    return {
        name: (merged[name].weight - module.weight).detach().numpy()
        for name, module in _linears(base).items()
    }


def _our_update(base: PreTrainedModel, folder: Path) -> dict[str, np.ndarray] | None:
    linears = _linears(base)
    try:
        adapter = read_peft(folder)
        check_fits(adapter, {n: (m.in_features, m.out_features) for n, m in linears.items()})
    except AdapterError:
        return None
    update = {name: np.zeros(tuple(m.weight.shape), np.float32) for name, m in linears.items()}
    for name, (a, b) in adapter.tensors.items():
        update[name] = b @ a * adapter.scaling(name)
    return update


def _write(folder: Path, base: PreTrainedModel, config: dict, modules: list[str]) -> None:
    random = torch.Generator().manual_seed(0)
    probe = PeftAdapter(config, {})
    state = {}
    for name, module in _linears(base).items():
        if name in modules:
            rank = probe.rank_of(name)
            shapes = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
            for part, shape in shapes.items():
                key = f"base_model.model.{name}.lora_{part}.weight"
                state[key] = torch.randn(shape, generator=random)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))


def _equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], base: nn.Module) -> bool:
    for name, module in _linears(base).items():
        # PEFT adds to the weight in float32, and the difference keeps that rounding.
        size = max(np.abs(ours[name]).max(), np.abs(theirs[name]).max(), module.weight.abs().max())
        if np.abs(ours[name] - theirs[name]).max() > rounding(8) * 4 * float(size):
            return False
    return True


def _tried(base: PreTrainedModel, folder: Path, config: dict) -> str:
    every = list(_linears(base))
    _write(folder, base, config, every)
    all_theirs, all_ours = _peft_update(base, folder), _our_update(base, folder)
    if all_theirs is None:
        assert all_ours is None, f"PEFT does not load {config}"
        return "not PEFT's"
    assert all_ours is None or _equal(all_ours, all_theirs, base), config
    chosen = [name for name in every if all_theirs[name].any()]
    if not chosen:
        return "nothing"
    _write(folder, base, config, chosen)
    theirs, ours = _peft_update(base, folder), _our_update(base, folder)
    assert theirs is not None
    if ours is None:
        return "refused"
    assert _equal(ours, theirs, base), config
    return "equal"


def _config(**fields: object) -> dict:
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6} | fields


COMBINATIONS = list(itertools.product(TARGETS, EXCLUDED, LAYERS, PATTERNS))


def _check(base: PreTrainedModel, folder: Path, every: int) -> None:
    numbers = itertools.cycle(itertools.product(RANKS, ALPHAS, (False, True)))
    outcomes: Counter[str] = Counter()
    for targets, excluded, layers, pattern in COMBINATIONS[::every]:
        ranks, alphas, rooted = next(numbers)
        config = _config(
            target_modules=targets,
            exclude_modules=excluded,
            layers_to_transform=layers,
            layers_pattern=pattern,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=rooted,
        )
        outcome = _tried(base, folder, config)
        # Without target_modules PEFT chooses by the base model, whose kind the folder does not say.
        assert outcome != "refused" or targets is None, config
        outcomes[outcome] += 1
    assert outcomes["equal"] * 8 > sum(outcomes.values())
    assert outcomes["refused"]
    assert outcomes["not PEFT's"]


def test_what_selects_modules(base: PreTrainedModel, tmp_path: Path) -> None:
    _check(base, tmp_path / "a", every=17)  # reaches every value of every field


@pytest.mark.full
def test_every_combination(base: PreTrainedModel, tmp_path: Path) -> None:
    _check(base, tmp_path / "a", every=1)


def test_ranks_alphas_and_rooted_scale(base: PreTrainedModel, tmp_path: Path) -> None:
    for ranks, alphas, rooted in itertools.product(RANKS, ALPHAS, (False, True)):
        config = _config(
            target_modules=["q_proj", "v_proj", "down_proj"],
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=rooted,
        )
        assert _tried(base, tmp_path / "a", config) == "equal"


def test_modules_without_tensors_that_peft_leaves_random_are_refused(
    base: PreTrainedModel, tmp_path: Path
) -> None:
    config = _config(target_modules=["down_proj"], init_lora_weights=False)
    shapes = {n: (m.in_features, m.out_features) for n, m in _linears(base).items()}
    _write(tmp_path / "a", base, config, [DOWN2])
    first, second = (_peft_update(base, tmp_path / "a") for _ in range(2))
    other = "model.layers.0.mlp.down_proj"
    assert first is not None
    assert second is not None
    assert not np.array_equal(first[other], second[other])
    with pytest.raises(AdapterError, match=f"2 misfits: {other} is selected and has no tensors"):
        check_fits(read_peft(tmp_path / "a"), shapes)
    _write(tmp_path / "a", base, config, [n for n in shapes if n.endswith("down_proj")])
    check_fits(read_peft(tmp_path / "a"), shapes)
