"""Run `strop` as `python -m strop.cli`, the form that job files use."""

from strop.cli.app import main

main()
