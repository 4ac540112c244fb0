"""`python -m prunezoo` is the command `prunezoo`."""

from .command import main

if __name__ == "__main__":
    raise SystemExit(main())
