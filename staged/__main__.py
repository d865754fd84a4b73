"""`python -m staged`, the same as the `staged` command."""

from staged.cli import main

if __name__ == "__main__":
    main()
