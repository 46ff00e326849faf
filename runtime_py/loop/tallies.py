"""The buffer's tallies in the store: they outlive the sets that they were made of."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from runtime_py.loop.buffer import Buffer
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.neighbours import coarse
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store

_KEY = "directions"  # in meta: what the sums' directions and domains depend on
_COLUMNS = ("observed", "asked")


def load_tallies(store: Store, buffer: Buffer, lexicons: Lexicons, now: Moment) -> None:
    """Fills the buffer's tallies. Those of a store that has none yet, or whose directions were made
    with another mean or other domains, begin anew with the sets that are stored."""
    names = lexicons.names
    key = _key(buffer.mean, names)
    if store.meta(_KEY) == key and _read(store, buffer, names):
        return
    buffer.count_stored()
    with store.transaction(durable=True):
        store.execute("DELETE FROM tallies")
        for place, name in enumerate(names):
            values: list[object] = []
            for tally in (buffer.observed, buffer.asked):
                total = tally.sums[place].astype("<i8").tobytes()
                values += [int(tally.counts[place]), total]
            store.execute("INSERT INTO tallies VALUES (?, ?, ?, ?, ?)", name, *values)
        store.set_meta(_KEY, key)
        if store.count("observed"):
            store.append(now, "tallies_restarted", None, {"sets": buffer.observed.count})


def _read(store: Store, buffer: Buffer, names: tuple[str, ...]) -> bool:
    """False where the rows are not one a domain, or of another length."""
    rows = store.rows("SELECT domain, observed, observed_sum, asked, asked_sum FROM tallies")
    size = 8 * buffer.directions.shape[1]
    sound = all(len(total) == size for row in rows for total in row[2::2])
    if not sound or {row[0] for row in rows} != set(names):
        return False
    for domain, *values in rows:
        place = names.index(domain)
        for tally, count, total in zip(
            (buffer.observed, buffer.asked), values[::2], values[1::2], strict=True
        ):
            tally.counts[place], tally.sums[place] = count, np.frombuffer(total, "<i8")
    return True


def count_direction(
    store: Store, column: str, domain: str, direction: np.ndarray, times: int = 1
) -> None:
    """Inside a transaction: adds one set of a domain to the tally ``column``, ``observed`` or
    ``asked``, or takes it away (``times`` −1); ``direction`` is int [hidden]."""
    if column not in _COLUMNS:
        raise ValueError(f"there is no tally {column!r}; expected {' or '.join(_COLUMNS)}.")
    ((count, total),) = store.rows(
        f"SELECT {column}, {column}_sum FROM tallies WHERE domain = ?", domain
    )
    changed = np.frombuffer(total, "<i8") + times * coarse(direction).astype("<i8")
    store.execute(
        f"UPDATE tallies SET {column} = ?, {column}_sum = ? WHERE domain = ?",
        count + times,
        changed.tobytes(),
        domain,
    )


def _key(mean: np.ndarray | None, names: tuple[str, ...]) -> str:
    digest = None if mean is None else hashlib.sha256(mean.astype("<f4").tobytes()).hexdigest()
    return json.dumps({"domains": names, "mean": digest}, ensure_ascii=False, sort_keys=True)
