"""Golden decisions: no score lies beyond half of its bound in another computation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exporters.model.assembly import build
from exporters.model.quantize import quantized
from exporters.model.spec import read_spec
from runtime_py.engine.self_test import StorelessSelection, policy_of
from runtime_py.loop.lexicons import read_lexicons
from runtime_py.loop.protocols import Embedding
from tests import tiny
from toolchain.compile import golden_vectors
from toolchain.compile.golden_scores import (
    TWICE,
    Computation,
    Embed,
    GoldenScoreBounds,
    Measured,
    ScoreSpread,
    Tokens,
    int8_computations,
    remembered,
    score_spread,
)
from toolchain.compile.golden_vectors import GoldenReference
from toolchain.compile.mean_vector import embedding
from toolchain.compile.noise import perturbed
from toolchain.compile.precision import ANDROID
from toolchain.compile.spread import of_scores

HIDDEN, DIALOGUES = 16, 40
WORDS = [
    "doctor",
    "pasta",
    "joy",
    "flight",
    "budget",
    "safety",
    "cloud",
    "pain",
    "sugar",
    "fear",
    "hotel",
    "loan",
]
STREAM = {
    f"d{number}": (" ".join(WORDS[: 1 + number % len(WORDS)]) + f" word{number}", [number])
    for number in range(DIALOGUES)
}


def own(tokens: Tokens) -> Measured:
    """A dialogue's own vector; entropies far from each other."""
    chance = np.random.default_rng(tokens[0])
    vector = chance.normal(size=HIDDEN).astype(np.float32) + np.float32(0.5)
    return vector, float(chance.uniform(0.5, 1.0))


def another(noise: dict[int, float], seed: int = 0) -> Embed:
    """Which rounds otherwise, by ``noise`` of the vector, 1e-2 by default."""

    def embed(tokens: Tokens) -> Measured:
        chance = np.random.default_rng(1000 * (seed + 1) + tokens[0])
        vector, entropy = own(tokens)
        size = noise.get(tokens[0], 1e-2)
        shaken = vector + size * chance.normal(size=HIDDEN)
        return shaken.astype(np.float32), entropy + 1e-3 * size * float(chance.normal())

    return embed


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch):
    """The golden decisions of ``STREAM`` where another engine rounds by ``noise``."""

    def run(noise: dict[int, float]) -> dict:
        spread = ScoreSpread.of(
            GoldenScoreBounds(0.0, 0.0), [Computation(TWICE, another(noise), own)]
        )
        monkeypatch.setattr(golden_vectors, "score_spread", lambda *arguments: spread)
        monkeypatch.setattr(golden_vectors, "remembered", lambda *arguments: own)
        model = SimpleNamespace(spec=SimpleNamespace(hidden=HIDDEN))
        return golden_vectors._decisions("android", GoldenReference("8da8w", model), STREAM, 99)

    return run


def replayed(golden: dict, embed: Embed) -> list[dict]:
    loop = StorelessSelection(policy_of(golden), read_lexicons(), HIDDEN)
    return [
        loop.observe(one["id"], one["text"], Embedding(*embed(one["tokens"])))
        for one in golden["dialogues"]
    ]


def margins(golden: dict, found: list[dict]) -> np.ndarray:
    """Of each score of each dialogue, as a part of its bound: [dialogues, 2], EOE and IDD."""
    scores = [np.array([row["scores"] for row in rows]) for rows in (found, golden["expected"])]
    eoe, dss, idd = golden["most"]
    assert dss == 0
    assert (scores[0][:, 1] == scores[1][:, 1]).all()
    return np.abs(scores[0] - scores[1])[:, [0, 2]] / np.array([eoe, idd])


def test_every_score_lies_within_half_of_its_bound(decided) -> None:
    golden = decided({})
    assert len(golden["dialogues"]) == 10
    assert sum(row["replaced"] is not None for row in golden["expected"]) == 2
    found = replayed(golden, another({}))
    assert margins(golden, found).max() <= 0.5
    assert [(a["bin"], a["replaced"]) for a in found] == [
        (b["bin"], b["replaced"]) for b in golden["expected"]
    ]


def test_a_dialogue_whose_rounding_would_make_choices_close_is_left_out(decided) -> None:
    """Planted beyond the first ten, which alone were measured once: its score lay far out."""
    chosen = [one["tokens"][0] for one in decided({})["dialogues"]]
    planted = next(number for number in chosen if number >= 10)
    noisy = {planted: 1.0}
    golden = decided(noisy)
    kept = [one["tokens"][0] for one in golden["dialogues"]]
    assert planted not in kept
    assert golden["most"] == pytest.approx(decided({})["most"], rel=2)
    assert margins(golden, replayed(golden, another(noisy))).max() <= 0.5
    # Without the rule it would have been written, with a score far beyond its bound.
    vectors = [own([number])[0] for number in chosen], [another(noisy)([n])[0] for n in chosen]
    units = [np.stack(rows) / np.linalg.norm(rows, axis=1)[:, None] for rows in vectors]
    gaps = np.abs(units[0] @ units[0].T - units[1] @ units[1].T)
    assert gaps[chosen.index(planted)].max() > 10 * decided({})["most"][2]


def test_a_noisy_dialogue_among_the_first_widens_the_bounds(decided) -> None:
    golden = decided({2: 1.0})
    assert golden["most"][2] > 10 * decided({})["most"][2]
    assert margins(golden, replayed(golden, another({2: 1.0}))).max() <= 0.5


@pytest.mark.parametrize(
    ("gaps", "told"),
    [
        ([[0.2, 0.01, 0.2]], True),  # surely beats it
        ([[-0.2, 5.0, 0.05]], True),  # surely does not, whatever the last is
        ([[0.05, 0.01, 0.2]], False),
        ([[0.05, 0.0, 0.05]], True),  # an equal DSS beats nothing
        ([[0.05, -0.01, 0.05]], True),
        ([[0.2, 0.01, 0.2], [0.2, 0.01, -0.05]], False),
    ],
)
def test_what_a_precision_can_tell(gaps: list, told: bool) -> None:
    assert GoldenScoreBounds(0.1, 0.1).tell(np.array(gaps)) is told


@torch.no_grad()
def test_bounds_of_a_model_hold_for_other_roundings_of_it() -> None:
    """Two that are not among those which the bounds were measured by."""
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    state = {name: value.float() for name, value in tiny.hugging_face("llama").state_dict().items()}
    texts = [tiny.tokens_of(40, seed)[0].tolist() for seed in range(8)]
    model = quantized(build(spec, state), ANDROID["8da8w"], [torch.tensor([t]) for t in texts])
    known = remembered(model, embedding)
    spread = score_spread("android", model, known, embedding, 40)
    assert [one.times for one in spread.computations] == [2.0**1.5, 2.0, 2.0]
    for text in texts:
        spread = spread.adding(text)
    bounds = spread.bounds
    for seed in (77, 78):
        with perturbed(model, seed):
            found = [embedding(model, text) for text in texts]
        pairs = [(a, known(text)) for a, text in zip(found, texts, strict=True)]
        off = of_scores([a[0] for a, _ in pairs], [b[0] for _, b in pairs])
        assert off <= 0.75 * bounds.idd
        assert max(abs(a[1] - b[1]) for a, b in pairs) <= 0.75 * bounds.eoe
    assert bounds.idd < 0.1
    assert len(int8_computations(model, known, embedding)) == 3


@torch.no_grad()
def test_float16_is_measured_and_not_excused_where_it_is_not_finite() -> None:
    spec = read_spec(tiny.config_of("llama"), tiny.CONTEXT)
    state = {name: value.float() for name, value in tiny.hugging_face("llama").state_dict().items()}
    model = build(spec, state)
    text = tiny.tokens_of(20)[0].tolist()
    spread = score_spread("ios", model, remembered(model, embedding), embedding, 20)
    empty, one = spread.bounds, spread.adding(text).adding(text[::-1]).bounds
    assert empty.idd == 8 * 2.0**-11 + 2.0**-19
    assert empty.idd < one.idd < 2 * empty.idd
    assert empty.eoe < one.eoe < 1e-2
    broken = Computation(4.0, lambda tokens: (np.full(4, np.nan), np.nan), own)
    bounds = ScoreSpread.of(GoldenScoreBounds(0.0, 0.0), [broken]).adding([1]).bounds
    assert bounds == GoldenScoreBounds(*[8 * 2.0**-11 + 2.0**-19] * 2)
