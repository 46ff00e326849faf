"""The policy that a store was last opened with, and the streams of random numbers it starts."""

from __future__ import annotations

import json

from runtime_py.loop.errors import LoopError
from runtime_py.loop.log import Event
from runtime_py.loop.policy import LoopPolicy
from runtime_py.loop.random_stream import STREAMS, SplitMix64
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store


def enter_policy(store: Store, policy: LoopPolicy, hidden: int, now: Moment) -> None:
    """A new store starts its streams; an old one notes that its policy has changed. ``hidden``:
    numbers of a vector of the bundle.

    Raises ``LoopError`` where the store's vectors are of another length.
    """
    text = policy.to_json()
    known, length = store.meta("policy"), store.meta("hidden")
    if length is not None and length != str(hidden):
        raise LoopError(
            f"the store {store.path} has vectors of {length} numbers, this bundle's have "
            f"{hidden}; open it with the bundle that it was made with."
        )
    streams = store.rows("SELECT count(*) FROM streams")[0][0]
    if known == text and streams == len(STREAMS):
        return
    with store.transaction(durable=True):
        store.set_meta("policy", text)
        store.set_meta("hidden", str(hidden))
        # what is there already was recovered from a damaged store
        missing = set(STREAMS) - {row[0] for row in store.rows("SELECT name FROM streams")}
        for offset, name in enumerate(STREAMS):
            if name in missing:
                seed = (policy.seed + offset) % (1 << 64)
                store.save_stream(name, SplitMix64(seed))
        store.execute("INSERT OR IGNORE INTO adapters (number, state) VALUES (0, 'kept')")
        changed: Event = "streams_restarted" if known == text else "policy_changed"
        event: Event = "store_made" if known is None else changed
        store.append(now, event, None, {"policy": json.loads(text)})
