"""Fine-tuning: exact steps against PyTorch and PEFT, labels, packing, resuming, bad input."""

from __future__ import annotations

import copy
import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tokenizers import processors

from exporters.training.programs import training_programs
from runtime_py.bundle import manifest as m
from runtime_py.bundle.adapter_state import AdapterState, FlatLayout
from runtime_py.bundle.chat_text import ChatText
from runtime_py.engine.base_weights import BaseWeights
from runtime_py.engine.examples import IGNORED, Example, example, fit, pack
from runtime_py.engine.run_state import FILE, Progress, load_state, save_state
from runtime_py.engine.streaming import StreamingEngine, step_numbers
from runtime_py.engine.trainer import train
from runtime_py.engine.training_engine import evaluate
from runtime_py.engine.training_plan import Settings
from runtime_py.loop.errors import DiskFull, TrainingError
from tests.exporters.training.training_kit import Kit, bounds_of, example_of, make_kit
from tests.exporters.training.training_way import Way, check_same_way
from tests.runtime_py.engine.toy import Toy, chat_text, dialogue, toy_state
from toolchain.compile.training_part import EagerPrograms
from toolchain.verify.reference_engines import PeftEngine

OPTIMIZER = m.Optimizer(beta1=0.9, beta2=0.999, epsilon=1e-8)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kit"), "llama")


@pytest.fixture
def engine(kit: Kit):
    return kit.engine(EagerPrograms(training_programs(kit.spec, [32])))


def sequences(count: int) -> list[Example]:
    return [example_of(10 + 3 * (i % 5), seed=i) for i in range(count)]


def test_twenty_steps_are_those_of_torch_and_peft(kit: Kit, engine, tmp_path: Path) -> None:
    """Accumulation, clipping, schedule and AdamW, beside plain autograd and torch's optimizer."""
    own = Settings(
        epochs=5,
        batch=2,
        learning_rate=3e-3,
        b_rate_ratio=4.0,
        schedule="cosine",
        warmup=3,
        clip=0.5,
        save_every=50,
    )
    examples = sequences(8)
    engines = {
        "streamed": engine,
        "torch": PeftEngine(kit.peft, kit.tensors, OPTIMIZER),
        "float64": PeftEngine(copy.deepcopy(kit.peft).double(), kit.tensors, OPTIMIZER),
    }
    states = {name: kit.state() for name in engines}
    losses = {}
    for name, one in engines.items():
        found = train(one, states[name], examples, own, OPTIMIZER, tmp_path / name)
        assert found is not None
        losses[name] = np.array(found.losses)
    assert losses["streamed"].shape == (20,)
    assert losses["streamed"][-1] < losses["streamed"][0]
    found, single, wide = (Way.of(kit.state(), states[name], losses[name]) for name in engines)
    assert min(single.moved.values()) > 1e-3  # it did learn
    check_same_way(found, single, wide, single.moved)


def test_accumulation_is_one_large_batch(kit: Kit, engine) -> None:
    """Sums over tokens: packing and order of calls change rounding only, not the gradient."""
    state, examples = kit.state(), sequences(4)
    one = state.layout.zeros()
    together = sum(engine.gradient(state, [e], one)[0] for e in examples)
    packed = state.layout.zeros()
    packs = pack(examples, engine.capacity)
    assert len(packs) < len(examples)
    loss = sum(engine.gradient(state, some, packed)[0] for some in packs)
    loss_bound, gradient_bound = bounds_of(kit, examples)
    assert abs(loss - together) <= loss_bound < 1e-2 * together
    assert np.abs(one - packed).max() <= gradient_bound * np.abs(one).max()
    mean, count = evaluate(engine, state, examples), sum(e.count for e in examples)
    assert abs(mean * count - together) <= loss_bound


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(2, 32), min_size=1, max_size=20))
def test_packs_hold_every_example_once(sizes: list[int]) -> None:
    examples = []
    for i, size in enumerate(sizes):
        labels = np.full(size, IGNORED, np.int64)
        labels[-1] = 1
        examples.append(Example(str(i), np.ones(size, np.int64), labels))
    packs = pack(examples, 32)
    assert sorted(e.id for p in packs for e in p) == sorted(e.id for e in examples)
    assert all(sum(e.inputs for e in p) <= 32 for p in packs)


def test_what_a_smaller_rank_leaves_zero_stays_zero(kit: Kit, engine, tmp_path: Path) -> None:
    """Rows of A and columns of B beyond a module's rank, and a module without any: their gradients
    and moments are zero to the bit, with weight decay too."""
    values = {name: value.copy() for name, value in kit.values.items()}
    ranks = {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.v_proj": 0}
    for module, rank in ranks.items():
        values[f"{module}.lora_A"][0, rank:] = 0
        values[f"{module}.lora_B"][0, :, rank:] = 0
    values["layers.1.self_attn.v_proj.scale"][...] = 0
    state = AdapterState.of(kit.tensors, values)
    own = Settings(epochs=2, batch=2, learning_rate=1e-2, weight_decay=0.1)
    assert train(engine, state, sequences(6), own, OPTIMIZER, tmp_path) is not None
    for matrix in (state.parameters, state.mean, state.square):
        views = state.layout.views(matrix)
        for module, rank in ranks.items():
            a, b = views[f"{module}.lora_A"][0], views[f"{module}.lora_B"][0]
            assert not a[rank:].any()
            assert not b[:, rank:].any()
            if rank:
                assert (a[:rank] != values[f"{module}.lora_A"][0, :rank]).all()
                assert b[:, :rank].any()


# Labels


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ChatText:
    return chat_text(tmp_path_factory.mktemp("text"))


def test_labels_are_what_the_assistant_said(text: ChatText) -> None:
    found = example(dialogue("the cat", "sat on the mat", "that other hat", "another mother"), text)
    said = [t for t, label in zip(found.tokens, found.labels, strict=True) if label != IGNORED]
    decoded = text.tokenizer.decode(said, skip_special_tokens=False)
    assert decoded == " sat on the mat</s> another mother</s>"
    assert found.inputs == int(np.flatnonzero(found.labels != IGNORED)[-1])
    assert found.count == len(said)
    assert (found.labels[found.labels != IGNORED] == said).all()


def test_labels_where_a_tokenizer_trims_spaces(text: ChatText) -> None:
    """A token of spaces alone has no characters then; what was said is the same."""
    two = dialogue("the  cat", "sat  on  the mat")
    expected = example(two, text)
    backend = text.tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    try:
        offsets = backend.encode(text.render(two.turns), add_special_tokens=False).offsets
        assert any(begin == end for begin, end in offsets)
        np.testing.assert_array_equal(example(two, text).labels, expected.labels)
    finally:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)


def test_too_long_is_cut_at_a_turn_or_refused(text: ChatText) -> None:
    short, long = dialogue("the cat", "sat", id="a"), dialogue("the", "cat " * 99, id="c")
    middle = dialogue("the cat", "sat", "that", "hat " * 50, id="b")
    fitted = fit([short, middle, long], text, 40)
    assert [[e.id for e in some] for some in fitted.sets] == [["a"], ["b"]]
    assert (fitted.cut, fitted.left_out) == (("b",), ("c",))
    (first,), (second,) = fitted.sets
    np.testing.assert_array_equal(first.tokens, second.tokens)
    with pytest.raises(TrainingError, match=r"2 dialogues are longer .* b, c"):
        fit([short, middle, long], text, 40, refuse_long=True)


def test_the_last_reply_alone(text: ChatText) -> None:
    """Its tokens are where they were; what was said before is read and not learned."""
    two = dialogue("the cat", "sat on the mat", "that other hat", "another mother")
    every, last = example(two, text), example(two, text, last_only=True)
    np.testing.assert_array_equal(last.tokens, every.tokens)
    said = [t for t, label in zip(last.tokens, last.labels, strict=True) if label != IGNORED]
    assert text.tokenizer.decode(said, skip_special_tokens=False) == " another mother</s>"
    assert last.inputs == every.inputs
    one = dialogue("the cat", "sat on the mat")
    np.testing.assert_array_equal(
        example(one, text, last_only=True).labels, example(one, text).labels
    )


def test_nothing_to_learn(text: ChatText) -> None:
    with pytest.raises(TrainingError, match="dialogue d has no token that the assistant said"):
        example(dialogue("the cat"), text)


def test_a_dialogue_of_several_sequences_counts_once(tmp_path: Path) -> None:
    """In a batch, in the budget of steps, and in what tells a run from another."""
    examples, steps = sequences(5), []
    own = replace(SETTINGS, steps=None, epochs=1, batch=1)
    found = train(
        *(Toy(), toy_state(), examples, own, OPTIMIZER, tmp_path),
        sets=[2, 1, 2],
        on_step=lambda step: steps.append(step.tokens),
    )
    assert found is not None
    read = [one.inputs for one in examples]
    assert sorted(steps) == sorted([read[0] + read[1], read[2], read[3] + read[4]])
    with pytest.raises(TrainingError, match="another run"):
        train(Toy(), toy_state(), examples, own, OPTIMIZER, tmp_path, sets=[1, 2, 2])


# Saving and going on


SETTINGS = Settings(epochs=3, batch=2, save_every=2, learning_rate=0.1)


@pytest.mark.parametrize("moment", range(0, 24, 5))
def test_stopped_and_resumed_ends_with_the_same_bits(moment: int, tmp_path: Path) -> None:
    examples = sequences(7)
    whole = toy_state()
    expected = train(Toy(), whole, examples, SETTINGS, OPTIMIZER, tmp_path / "whole")
    assert expected is not None
    state, calls = toy_state(), iter(range(10_000))
    stopped = train(
        *(Toy(), state, examples, SETTINGS, OPTIMIZER, tmp_path / "cut"),
        stop=lambda: next(calls) >= moment,
    )
    resumed = toy_state()
    outcome = train(Toy(), resumed, examples, SETTINGS, OPTIMIZER, tmp_path / "cut")
    assert stopped is None or moment >= 11
    assert outcome is not None
    assert outcome.losses == expected.losses
    for name in ("parameters", "mean", "square"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    examples = sequences(6)
    state = toy_state()
    with pytest.raises(TrainingError, match=r"random-\d.* in step 3 is nan.*state of step 2"):
        train(Toy(fail=3), state, examples, replace(SETTINGS, save_every=99), OPTIMIZER, tmp_path)
    kept = toy_state()
    good = toy_state()
    calls = iter(range(10_000))
    train(
        *(Toy(), good, examples, SETTINGS, OPTIMIZER, tmp_path / "good"),
        stop=lambda: next(calls) >= 2,
    )
    progress = json.loads(_metadata(tmp_path / FILE)["progress"])
    assert load_state(tmp_path, kept, progress["job"]).step == 2  # type: ignore[union-attr]
    np.testing.assert_array_equal(kept.parameters, good.parameters)


def _metadata(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]


def test_a_state_that_does_not_belong(tmp_path: Path) -> None:
    state = toy_state()
    save_state(tmp_path, state, Progress(1, (0.5,), 1.0, "job"))
    with pytest.raises(TrainingError, match="another run"):
        load_state(tmp_path, toy_state(), "other")
    tensor = m.AdapterTensor(name="layers.0.y.lora_A", peft="p", rows=(0, 2), shape=(1, 2, 9))
    other = AdapterState.of([tensor], {tensor.name: np.zeros((1, 2, 9), np.float32)})
    with pytest.raises(TrainingError, match="another adapter"):
        load_state(tmp_path, other, "job")
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-5])
    with pytest.raises(TrainingError, match="not a whole training state"):
        load_state(tmp_path, toy_state(), "job")
    assert load_state(tmp_path / "none", toy_state(), "job") is None


def test_another_base_or_capacity_is_another_run(tmp_path: Path) -> None:
    """The same adapter on other weights, or packed otherwise, would not end with the same bits."""
    examples = sequences(2)
    train(Toy(), toy_state(), examples, SETTINGS, OPTIMIZER, tmp_path, base="a")
    with pytest.raises(TrainingError, match="another run"):
        train(Toy(), toy_state(), examples, SETTINGS, OPTIMIZER, tmp_path, base="b")
    wide = Toy()
    wide.capacity = 128
    with pytest.raises(TrainingError, match="another run"):
        train(wide, toy_state(), examples, SETTINGS, OPTIMIZER, tmp_path, base="a")


def test_a_full_disk_keeps_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, toy_state(), Progress(1, (0.5,), 1.0, "job"))
    before = (tmp_path / FILE).read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskFull, match="no space is left"):
        save_state(tmp_path, toy_state(), Progress(2, (0.5, 0.4), 2.0, "job"))
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_weights_that_are_not_the_manifests(kit: Kit, tmp_path: Path) -> None:
    path = kit.folder / kit.training.weights
    (tmp_path / "short").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TrainingError, match="not a whole safetensors file"):
        BaseWeights(tmp_path / "short")
    save_file({"norm": np.zeros((1, 64, 1), np.float32)}, tmp_path / "other")
    programs = EagerPrograms(training_programs(kit.spec, [32]))
    with pytest.raises(TrainingError, match=r"no tensor head\.value: it does not belong"):
        StreamingEngine(programs, BaseWeights(tmp_path / "other"), kit.training)


def test_a_budget_without_end_keeps_every_layer(kit: Kit) -> None:
    engine = kit.engine(EagerPrograms(training_programs(kit.spec, [32])), math.inf)
    assert engine.kept_layers(32) == len(kit.training.layers) - 1


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no dialogue to train on"):
        train(Toy(), toy_state(), [], SETTINGS, OPTIMIZER, tmp_path)


def test_the_flat_layout_is_the_manifests_order(kit: Kit) -> None:
    layout = FlatLayout.of(kit.tensors)
    trained = [t for t in kit.tensors if not t.name.endswith(".scale")]
    assert list(layout.places) == [t.name for t in trained]
    size = sum(int(np.prod(t.shape)) for t in trained)
    assert layout.rows == -(-size // 1024)
    state = kit.state()
    line = np.concatenate([kit.values[t.name].ravel() for t in trained])
    np.testing.assert_array_equal(state.parameters.ravel()[:size], line)
    assert not state.parameters.ravel()[size:].any()


def test_every_number_has_its_rate() -> None:
    """Of A and of all Bs of a fused module, row by row through the flat matrix."""
    shapes = {"lora_A": (1, 4, 300), "lora_B_0": (1, 100, 4), "lora_B_1": (1, 50, 4)}
    tensors = [
        m.AdapterTensor(name=f"layers.0.self_attn.qkv_proj.{part}", peft="p", rows=(0, 1), shape=s)
        for part, s in shapes.items()
    ]
    layout = FlatLayout.of(tensors)
    rates = layout.zeros()
    layout.fill_rates(rates, 0.5, 2.0)
    line = rates.ravel()
    assert line.dtype == np.float32
    assert (line[:1200] == 0.5).all()
    assert (line[1200:1800] == 2.0).all()


def test_step_numbers() -> None:
    numbers = step_numbers(3, 40, (0.1, 0.4), 0.01, 1.0, (0.9, 0.999))
    assert numbers.per_token == 1 / 40
    assert (numbers.rates, numbers.weight_decay) == ((0.1, 0.4), 0.01)
    # β³ has three roundings of 2⁻⁵³, and what is left of 1 after it is 0.3 or 0.003.
    expected = (1 / (1 - 0.9**3), 1 / (1 - 0.999**3))
    for found, wanted in zip(numbers.corrections, expected, strict=True):
        assert abs(found - wanted) <= 4 * 2.0**-53 * wanted**2
