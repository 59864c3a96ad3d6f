"""`python -m tiermem` is the command `tiermem`."""

from tiermem.cli import main

if __name__ == "__main__":
    main()
