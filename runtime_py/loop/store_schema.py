"""The store's tables, and the steps from each schema version to the next.

A step is never changed once a store was made with it; a new version is a new step at the end.
"""

from __future__ import annotations

APPLICATION_ID = 0x6174746E  # "attn", in the file's header

_VERSION_1 = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    # state: 16 hexadecimal digits, since SQLite has no unsigned 64-bit integers
    "CREATE TABLE streams (name TEXT PRIMARY KEY, state TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE sets (
        bin INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        turns TEXT NOT NULL,      -- JSON [[role, content], ...]
        eoe REAL NOT NULL, dss REAL NOT NULL, idd REAL NOT NULL,
        domain TEXT NOT NULL,
        vector BLOB NOT NULL,     -- float32, little endian [hidden]
        number INTEGER NOT NULL   -- which observed set it was, from 1
    )""",
    """CREATE TABLE questions (
        id TEXT PRIMARY KEY REFERENCES sets (id) ON DELETE CASCADE,
        number INTEGER NOT NULL   -- of the set, for their order
    )""",
    """CREATE TABLE annotations (
        id TEXT PRIMARY KEY REFERENCES sets (id) ON DELETE CASCADE,
        answer TEXT,              -- null: the reply is acceptable
        number INTEGER NOT NULL,  -- which answer it was, from 1
        held_out INTEGER NOT NULL,
        paraphrased INTEGER NOT NULL DEFAULT 0,  -- paraphrases tried, whatever came of it
        used_in INTEGER           -- the last job that it was part of
    )""",
    """CREATE TABLE synthetic (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        source TEXT NOT NULL REFERENCES annotations (id) ON DELETE CASCADE,
        ordinal INTEGER NOT NULL,  -- from 0, of the source's paraphrases
        question TEXT NOT NULL, answer TEXT NOT NULL,
        question_rouge1 REAL NOT NULL, answer_rouge1 REAL NOT NULL,
        question_seed INTEGER NOT NULL, answer_seed INTEGER NOT NULL,
        adapter INTEGER NOT NULL,  -- that the model wrote them with
        UNIQUE (source, ordinal)
    )""",
    """CREATE TABLE adapters (
        number INTEGER PRIMARY KEY,
        parent INTEGER REFERENCES adapters (number),
        file TEXT,                 -- in adapters/; null: the bundle's own, or deleted since
        sha256 TEXT,
        heldout_loss_before REAL, heldout_loss_after REAL,
        state TEXT NOT NULL        -- kept, rolled_back or deleted
    )""",
    # which sets an adapter was trained on, itself and not through its parent
    """CREATE TABLE learnt (
        adapter INTEGER NOT NULL REFERENCES adapters (number) ON DELETE CASCADE,
        id TEXT NOT NULL,
        forgotten INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (adapter, id)
    ) WITHOUT ROWID""",
    """CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,
        parent INTEGER NOT NULL REFERENCES adapters (number),
        seed INTEGER NOT NULL,
        sequence_tokens INTEGER NOT NULL,
        epochs INTEGER NOT NULL, learning_rate REAL NOT NULL, batch INTEGER NOT NULL
    )""",
    """CREATE TABLE job_sets (
        job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        held_out INTEGER NOT NULL,
        source TEXT NOT NULL,      -- the answered set that it is or comes from
        id TEXT NOT NULL,
        turns TEXT NOT NULL,
        PRIMARY KEY (job, position)
    ) WITHOUT ROWID""",
    """CREATE TABLE log (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        seconds REAL NOT NULL,
        day INTEGER NOT NULL,
        event TEXT NOT NULL,
        id TEXT,                   -- of the dialogue set, where there is one
        data TEXT NOT NULL         -- JSON object; never a dialogue's text
    )""",
    "CREATE UNIQUE INDEX observed_once ON log (id) WHERE event IN ('kept', 'refused')",
    """CREATE TRIGGER log_is_not_changed BEFORE UPDATE ON log
       BEGIN SELECT RAISE (ABORT, 'the log is append-only'); END""",
    """CREATE TRIGGER log_is_not_deleted BEFORE DELETE ON log
       BEGIN SELECT RAISE (ABORT, 'the log is append-only'); END""",
)

_VERSION_2 = (
    # 0: frozen before jobs had a number of steps, which is counted when the job goes on
    "ALTER TABLE jobs ADD COLUMN steps INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE jobs ADD COLUMN b_rate_ratio REAL NOT NULL DEFAULT 1.0",
    "ALTER TABLE jobs ADD COLUMN check_every INTEGER NOT NULL DEFAULT 1",
    # the defaults are those of jobs that knew none of this
    "ALTER TABLE jobs ADD COLUMN forgetting_bound REAL NOT NULL DEFAULT 1e6",
    "ALTER TABLE jobs ADD COLUMN forgetting_tokens INTEGER NOT NULL DEFAULT 2048",
    "ALTER TABLE jobs ADD COLUMN replay_share REAL NOT NULL DEFAULT 0.0",
    # training, stopping or guard; null: frozen before, training or guard as held_out says
    "ALTER TABLE job_sets ADD COLUMN part TEXT",
    # which exchange is asked about, from 0; null: the last. day: it was asked on; null: unknown
    "ALTER TABLE questions ADD COLUMN exchange INTEGER",
    "ALTER TABLE questions ADD COLUMN day INTEGER",
    "ALTER TABLE annotations ADD COLUMN exchange INTEGER",
    # whether it was ever asked about, and the words of the reply that would be; null: of the last
    "ALTER TABLE sets ADD COLUMN asked INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE sets ADD COLUMN answer_words INTEGER",
    """CREATE TABLE tallies (
        kind TEXT NOT NULL,       -- observed or asked
        domain TEXT NOT NULL,
        sets INTEGER NOT NULL,
        sum BLOB NOT NULL,        -- of their directions: int64, little endian [hidden]
        PRIMARY KEY (kind, domain)
    )""",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2)
"""Entry v takes a store from schema version v to v + 1."""

TABLES = (  # parents before children
    "meta",
    "counters",
    "streams",
    "sets",
    "questions",
    "annotations",
    "synthetic",
    "adapters",
    "learnt",
    "jobs",
    "job_sets",
    "log",
    "tallies",
)


def tables_of(version: int) -> tuple[str, ...]:
    """Those that a store of a schema version has, parents before children."""
    made = "\n".join(sql for step in MIGRATIONS[:version] for sql in step)
    return tuple(table for table in TABLES if f"CREATE TABLE {table} " in made)
