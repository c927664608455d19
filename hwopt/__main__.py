"""`python -m hwopt` is the command line."""

from hwopt.cli import main

main()
