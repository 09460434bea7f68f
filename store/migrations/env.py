"""Alembic's entry point, always on a connection whose transaction the caller began."""

from alembic import context

from store.migrations import VERSION_TABLE
from store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    # SQLite cannot alter most things in place: Alembic rebuilds the table.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
