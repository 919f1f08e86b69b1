"""Measurements: one request beside a peer (peer.py), the engine under load (load.py), and how it
holds out (stress.py). Every figure is taken in the run that prints it.
"""

from qnext.bench.peer import BenchOptions, run, table

__all__ = ["BenchOptions", "run", "table"]
