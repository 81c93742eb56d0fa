"""`python -m distill`, as launchers of several processes call it."""

from distill.cli import main

main()
