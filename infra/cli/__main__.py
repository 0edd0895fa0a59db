"""`python -m infra.cli`: what the supervisor starts, so that it needs no script on PATH."""

from infra.cli.main import main

main()
