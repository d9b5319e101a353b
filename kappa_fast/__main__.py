"""``python -m kappa_fast``: the command line without the script."""

from .cli import main

if __name__ == "__main__":
    main()
