"""Alembic's entry: it gets an open connection from ``twinslot_server.store`` and nothing else."""

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, transactional_ddl=False)
context.run_migrations()
