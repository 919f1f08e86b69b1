"""``python -m qnext.train RECIPE.toml [key=value ...]``: ``qnext train`` without its terminal."""

from __future__ import annotations

import logging
import sys

from qnext.errors import QnextError
from qnext.train import main

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if len(sys.argv) < 2:
        sys.exit("usage: python -m qnext.train RECIPE.toml [key=value ...]")
    try:
        main(sys.argv[1], sys.argv[2:])
    except QnextError as error:
        sys.exit(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
