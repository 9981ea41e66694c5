"""The database of an annotation: tasks, who was handed which, and every label ever given.

Nothing is ever overwritten: a label that is undone is marked as withdrawn and stays. SQLite writes ahead and waits for
the disk at each commit, so that an acknowledged label outlives a killed process and a power cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lit_align.utils.secret import redact_text

VERSION = "1"
METADATA = sa.MetaData()

ABOUT = sa.Table("about", METADATA, sa.Column("key", sa.String(40), primary_key=True), sa.Column("value", sa.Text))
TASKS = sa.Table(
    "tasks",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("place", sa.Integer, nullable=False),
    sa.Column("control", sa.Boolean, nullable=False),
    sa.Column("body", sa.Text, nullable=False),  # JSON of a Task
)
GUIDELINES = sa.Table(
    "guidelines",
    METADATA,
    sa.Column("version", sa.String(12), primary_key=True),
    sa.Column("body", sa.Text, nullable=False),  # JSON of a Guideline
    sa.Column("time", sa.String(40), nullable=False),
)
ASSIGNMENTS = sa.Table(
    "assignments",
    METADATA,
    sa.Column("task", sa.String(64), sa.ForeignKey("tasks.id"), primary_key=True),
    sa.Column("annotator", sa.String(200), primary_key=True),
    sa.Column("time", sa.Float, nullable=False),  # seconds since the epoch; the latest is open
)
LABELS = sa.Table(
    "labels",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(64), nullable=False, unique=True),  # the browser's: a repeated request stores nothing
    sa.Column("task", sa.String(64), sa.ForeignKey("tasks.id"), nullable=False),
    sa.Column("annotator", sa.String(200), nullable=False),
    sa.Column("kind", sa.String(10), nullable=False),  # label, skip or flag
    sa.Column("answer", sa.Text, nullable=False),  # JSON
    sa.Column("guideline", sa.String(12), nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("time", sa.String(40), nullable=False),
    sa.Column("withdrawn", sa.Boolean, nullable=False, default=False),
)
# One label of each annotator of each task counts, whatever the number of requests and of servers.
sa.Index(
    "one_label_counts",
    LABELS.c.task,
    LABELS.c.annotator,
    unique=True,
    sqlite_where=LABELS.c.withdrawn == sa.false(),
    postgresql_where=LABELS.c.withdrawn == sa.false(),
)


def connect(url: str) -> sa.Engine:
    """The engine of a database, its tables made if they are not there.

    Args:
        url: of SQLAlchemy, such as sqlite:///labels.db or postgresql+pg8000://user@host/name.

    Raises:
        ValueError: it cannot be reached, its driver is not installed, or another version of lit_align made it.
    """
    try:
        engine = sa.create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _set_up_sqlite)
        METADATA.create_all(engine)
        with engine.begin() as connection:
            made = connection.execute(sa.select(ABOUT.c.value).where(ABOUT.c.key == "version")).scalar()
            if made is None:
                connection.execute(sa.insert(ABOUT).values(key="version", value=VERSION))
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        told = redact_text(str(error).splitlines()[0])
        raise ValueError(f"--database {redact_text(url)}: cannot be used: {told}") from error
    if made not in (None, VERSION):
        raise ValueError(f"--database {redact_text(url)}: holds tables of version {made}, expected {VERSION}")
    return engine


def _set_up_sqlite(connection: Any, record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # a commit has reached the disk before it is acknowledged
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()


def has_tasks(engine: sa.Engine) -> bool:
    """True if a database holds a task."""
    with engine.connect() as connection:
        return connection.execute(sa.select(TASKS.c.id).limit(1)).first() is not None


def sqlite_url(path: Path) -> str:
    """URL of a SQLite file."""
    return f"sqlite:///{path.resolve()}"
