"""`python -m infra.cli`: what works where no script is on PATH."""

from infra.cli import main

main()
