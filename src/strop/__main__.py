"""`python -m strop` is `strop`: for environments whose scripts are not on the PATH."""

from strop.cli.app import main

if __name__ == "__main__":
    main()
