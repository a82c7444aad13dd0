"""`python -m regraft`."""

from regraft.cli.main import main

main()
