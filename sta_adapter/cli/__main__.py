"""`python -m sta_adapter.cli`."""

from sta_adapter.cli import main

main()
