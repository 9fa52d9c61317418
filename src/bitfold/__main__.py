"""`python -m bitfold` is the command line."""

from bitfold.cli import main

main()
