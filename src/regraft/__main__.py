"""`python -m regraft`."""

from regraft.cli.main import process

if __name__ == "__main__":  # processes that a run of claims starts import this file as well
    process()
