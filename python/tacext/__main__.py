"""`python -m tacext`."""

from .cli import main

main()
