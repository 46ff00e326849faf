"""The buffer's tallies in the store: they outlive the sets that they were made of."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np

from runtime_py.loop.buffer import Buffer
from runtime_py.loop.lexicons import Lexicons
from runtime_py.loop.neighbours import coarse
from runtime_py.loop.schedule import Moment
from runtime_py.loop.store import Store
from runtime_py.loop.tally import Tally

_KEY = "directions"  # in meta: what the sums' directions and domains depend on
Kind = Literal["observed", "asked"]


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
        for kind, tally in _by_kind(buffer).items():
            for name, count, total in zip(names, tally.counts, tally.sums, strict=True):
                values = (kind, name, int(count), total.astype("<i8").tobytes())
                store.execute("INSERT INTO tallies VALUES (?, ?, ?, ?)", *values)
        store.set_meta(_KEY, key)
        if store.count("observed"):
            store.append(now, "tallies_restarted", None, {"sets": buffer.observed.count})


def count_direction(
    store: Store, kind: Kind, domain: str, direction: np.ndarray, times: int = 1
) -> None:
    """Inside a transaction: adds one set of a domain to a tally, or takes it away (``times`` −1);
    ``direction`` is int [hidden]."""
    ((count, total),) = store.rows(
        "SELECT sets, sum FROM tallies WHERE kind = ? AND domain = ?", kind, domain
    )
    changed = np.frombuffer(total, "<i8") + times * coarse(direction).astype("<i8")
    store.execute(
        "UPDATE tallies SET sets = ?, sum = ? WHERE kind = ? AND domain = ?",
        count + times,
        changed.tobytes(),
        kind,
        domain,
    )


def _by_kind(buffer: Buffer) -> dict[str, Tally]:
    return {"observed": buffer.observed, "asked": buffer.asked}


def _read(store: Store, buffer: Buffer, names: tuple[str, ...]) -> bool:
    """False where there is not one row of each kind and domain, or one of another length."""
    rows = store.rows("SELECT kind, domain, sets, sum FROM tallies")
    tallies = _by_kind(buffer)
    size = 8 * buffer.directions.shape[1]
    whole = {(kind, name) for kind in tallies for name in names}
    if {row[:2] for row in rows} != whole or any(len(row[3]) != size for row in rows):
        return False
    for kind, domain, count, total in rows:
        place = names.index(domain)
        tallies[kind].counts[place] = count
        tallies[kind].sums[place] = np.frombuffer(total, "<i8")
    return True


def _key(mean: np.ndarray | None, names: tuple[str, ...]) -> str:
    digest = None if mean is None else hashlib.sha256(mean.astype("<f4").tobytes()).hexdigest()
    return json.dumps({"domains": names, "mean": digest}, ensure_ascii=False, sort_keys=True)
