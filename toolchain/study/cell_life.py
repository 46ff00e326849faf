"""The life of the loop that a cell describes: what it observes, what is answered, its nights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from runtime_py.loop import records
from runtime_py.loop.dialogue import Dialogue
from runtime_py.loop.errors import AnswerTooLong, LoopError
from runtime_py.loop.fine_tuning import FineTuneReport
from runtime_py.loop.personalizer import Personalizer
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.presets import preset
from runtime_py.loop.schedule import Conditions, Moment
from toolchain.study.answers import answers_of
from toolchain.study.cells import Cell
from toolchain.study.recorded import Night, RecordedEngine, RecordedTuner
from toolchain.study.world import World

EVERYTHING = ("everything_steps", "everything_epochs")
UNTOUCHED = ("retrieval", "random_examples")  # rows that answer without an adapter
# What is trained on everything is a bound to compare with: its guard looks at the mean alone, and
# what a small buffer gains by paraphrases is not its matter.
_UNJUDGED = {"guard_false_acceptance": 1.0, "paraphrases": 0}
_ON_THE_CHARGER = Conditions(True, True, 20.0, 1 << 20)
_MOST_STEPS = 10_000
DIALOGUES_A_DAY = 100
DRAFT_TOKENS = 64


@dataclass(frozen=True)
class CellLived:
    """``adapter``: the file of the active version; ``nights``: what the loop said of each, and
    ``work`` what was computed; ``refused``: answers that could not be learned; ``tokens``: of all
    answers; ``answered``: the sets in the buffer that were answered, in the order of the answers.
    """

    app: Personalizer
    adapter: Path
    nights: tuple[FineTuneReport, ...]
    work: tuple[Night, ...]
    asked: int
    refused: int
    tokens: int
    answered: tuple[Dialogue, ...]


def cell_policy(cell: Cell, world: World, observed: int) -> LoopPolicy:
    """The bundle's policy or the preset, with the cell's fields; ``observed``: dialogues.

    A cell that counts answers asks about stored sets when all is observed; else the policy's own
    questions are asked, day by day.
    """
    options = cell.options
    start = preset(str(options["preset"])) if options["preset"] else world.policy
    policy = LoopPolicy.from_fields({**asdict(start), **cell.policy, "seed": cell.ordering})
    nights, answers = int(options["nights"]), int(options["answers"])
    changes: dict[str, object] = {"fine_tune_every_sets": max(1, observed // nights)}
    if cell.row in EVERYTHING:
        changes |= {"selection": "fifo", "bins": observed, **_UNJUDGED}
        answers = nights * observed
    if answers:
        rule = policy.asking if policy.asking != "entry" else "random"
        changes |= {"asking": rule, "questions_per_day": -(-answers // nights)}
    steps = int(options["steps"])
    if cell.row == "everything_steps" and not steps:
        steps = steps_for(policy, min(int(options["answers"]) or policy.bins, policy.bins))
    if steps:
        changes |= {"fewest_steps": steps, "most_steps": steps}
    elif cell.row == "everything_epochs":
        changes["most_steps"] = _MOST_STEPS
    return LoopPolicy.from_fields({**asdict(policy), **changes})


def steps_for(policy: LoopPolicy, answers: int) -> int:
    """What the loop takes with so many answers, its held-out share among them."""
    learnt = answers - -(-answers // policy.heldout_every)
    budget = -(-learnt * policy.epochs // policy.batch)
    return max(policy.fewest_steps, min(policy.most_steps, budget))


class CellLife:
    """``folder``: of the store. Use ``live`` once, and close the app when all is read."""

    def __init__(self, cell: Cell, world: World, stream: Sequence[Dialogue], folder: Path) -> None:
        self._cell, self._stream = cell, stream
        self._ideal = {dialogue.id: dialogue for dialogue in stream}
        self.policy = cell_policy(cell, world, len(stream))
        self._engine = RecordedEngine(world.engine.with_estimator(str(cell.options["estimator"])))
        self._model, self._tuner = world.model, RecordedTuner(world.tuner)
        self._day, self._refused, self._given, self._spent = 0, 0, 0, 0
        self._asked: set[str] = set()
        self.app = world.loop(
            folder,
            self.policy,
            self._engine,
            self._tuner,
            lambda: Moment(86400.0 * self._day, self._day),
        )

    def prepare(self, dialogues: Sequence[Dialogue]) -> None:
        """Embeds in batches what the loop will embed one by one."""
        self._engine.prepare(dialogues)

    def live(self) -> CellLived:
        """Observes the whole stream; each night's part ends with its answers and a fine-tuning."""
        self.prepare(self._stream)
        nights = int(self._cell.options["nights"])
        counted = bool(self._cell.options["answers"]) or self._cell.row in EVERYTHING
        reports, work = [], []
        for night in range(nights):
            for place, dialogue in enumerate(_part(self._stream, night, nights)):
                self.app.observe(dialogue)
                if not counted:
                    self._answer()
                    if (place + 1) % DIALOGUES_A_DAY == 0:
                        self._day += 1
            if counted:
                # A new day chooses its questions once: now that all is observed. None is chosen
                # before, for the days until then are the last evening's.
                self._day += max(2, self.policy.question_days)
                self._answer()
            if self._cell.row not in UNTOUCHED:
                self._engine.replies.clear()
                self._tuner.runs.clear()
                reports.append(self.app.fine_tune(_ON_THE_CHARGER))
                work.append(Night(tuple(self._engine.replies), tuple(self._tuner.runs)))
            if not counted:
                self._day += 2
        answered = tuple(one.dialogue for one in records.annotated_sets(self.app.store))
        file = self._engine.file
        if file is None:
            raise LoopError("the life of this cell had no adapter; please report it.")
        return CellLived(
            app=self.app,
            adapter=file,
            nights=tuple(reports),
            work=tuple(work),
            asked=len(self._asked),
            refused=self._refused,
            tokens=self._spent,
            answered=answered,
        )

    def _answer(self) -> None:
        """The user looks at each question once: what is not answered then never is."""
        new = [one for one in self.app.pending_questions() if one.id not in self._asked]
        if not new:
            return
        self._asked.update(one.id for one in new)
        given = answers_of(
            str(self._cell.options["user"]),
            [self._asked_about(question.dialogue, question.exchange) for question in new],
            self._cell.ordering,
            float(self._cell.options["answer_rate"]),
            self._drafts,
            self._stream,
        )
        for id, text in given.items():
            tokens = len(self._model.text.encode(text))
            if not self._affordable(tokens):
                continue
            try:
                self.app.answer(id, text)
            except AnswerTooLong:  # another's answer can be too long to be learned
                self._refused += 1
                continue
            self._given += 1
            self._spent += tokens

    def _affordable(self, tokens: int) -> bool:
        """Within the answers, and the tokens of all answers, that the cell allows."""
        options = self._cell.options
        answers, most = int(options["answers"]), int(options["answer_tokens"])
        if answers and self._cell.row not in EVERYTHING and self._given == answers:
            return False
        return not most or self._spent + tokens <= most

    def _asked_about(self, dialogue: Dialogue, exchange: int) -> Dialogue:
        """Up to the exchange whose reply is asked about: the stream's own, and so the reference."""
        return replace(dialogue, turns=dialogue.turns[: 2 * exchange + 2])

    def _drafts(self, asked: Sequence[Dialogue]) -> Sequence[str]:
        return self._model.replies([dialogue.turns[:-1] for dialogue in asked], DRAFT_TOKENS)


def _part(stream: Sequence[Dialogue], night: int, nights: int) -> Sequence[Dialogue]:
    """What is observed before a night: none has fewer than a fine-tuning is due after."""
    begin, end = (number * len(stream) // nights for number in (night, night + 1))
    return stream[begin:end]
