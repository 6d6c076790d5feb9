"""`python -m latentize`: the command line."""

from latentize.cli import main

main()
