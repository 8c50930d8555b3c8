"""`python -m rlsedit_fast` is the command line `rlsedit`."""

from rlsedit_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
