"""Run strop as `python -m strop`, for environments without scripts on the PATH."""

from strop.cli.app import main

if __name__ == "__main__":
    main()
