"""``python -m qnext``: the same as the ``qnext`` command."""

from qnext.cli import main

if __name__ == "__main__":
    main()
