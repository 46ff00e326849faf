"""What a real stream has between the dialogues that teach something."""

from __future__ import annotations

from runtime_py.loop.dialogue import Dialogue, Turn
from runtime_py.loop.random_stream import SplitMix64

_GREETINGS = (
    "Hi",
    "Hello",
    "Hey there",
    "Good morning",
    "Good evening",
    "Hi again",
    "Yo",
    "Hello?",
)
_WELCOMES = (
    "Hello! How can I help you?",
    "Hi there! What can I do for you today?",
    "Good to see you. What is on your mind?",
)
_ACKNOWLEDGEMENTS = (
    *("Thanks", "Thank you, that's all", "OK", "Great, thanks", "Cool", "Got it", "Yes, perfect"),
    *("Never mind", "Bye"),
)
_CLOSINGS = (
    "You are welcome!",
    "Glad I could help. Have a nice day!",
    "No problem. Let me know if you need anything else.",
)
_BEWILDERMENTS = (
    "I am sorry, I did not understand that.",
    "Could you say that in other words?",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz;,.1234"


def greeting(id: str, stream: SplitMix64) -> Dialogue:
    return _exchange(id, _one(_GREETINGS, stream), _one(_WELCOMES, stream))


def acknowledgement(id: str, stream: SplitMix64) -> Dialogue:
    return _exchange(id, _one(_ACKNOWLEDGEMENTS, stream), _one(_CLOSINGS, stream))


def gibberish(id: str, stream: SplitMix64) -> Dialogue:
    """One to six runs of keys."""
    runs = [
        "".join(_LETTERS[stream.below(len(_LETTERS))] for _ in range(2 + stream.below(9)))
        for _ in range(1 + stream.below(6))
    ]
    return _exchange(id, " ".join(runs), _one(_BEWILDERMENTS, stream))


def near_duplicate(id: str, original: Dialogue, stream: SplitMix64) -> Dialogue:
    """Each of the user's turns has a word twice, or one less; the replies are as they were."""
    turns = tuple(
        Turn(turn.role, reworded(turn.content, stream)) if turn.role == "user" else turn
        for turn in original.turns
    )
    return Dialogue(id, turns)


def reworded(text: str, stream: SplitMix64) -> str:
    """Never the same, and never blank."""
    parts = text.split(" ")
    words = [place for place, part in enumerate(parts) if part.strip()]
    place = words[stream.below(len(words))]
    if len(words) >= 4 and stream.below(2):
        del parts[place]
    else:
        parts.insert(place, parts[place])
    return " ".join(parts)


def _exchange(id: str, question: str, answer: str) -> Dialogue:
    return Dialogue(id, (Turn("user", question), Turn("assistant", answer)))


def _one(texts: tuple[str, ...], stream: SplitMix64) -> str:
    return texts[stream.below(len(texts))]
