"""`python -m proximo` is the command `proximo`."""

from proximo.cli import main

if __name__ == "__main__":
    main()
