"""`python -m rlsedit_fast` prints versions, machine, backends and build; see `doctor`."""

from rlsedit_fast.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
