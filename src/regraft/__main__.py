"""`python -m regraft`."""

from regraft.cli.main import process

process()
