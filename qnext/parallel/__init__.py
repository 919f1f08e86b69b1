"""Many devices: surgery on a built module tree, which itself knows nothing of ranks.

One rule holds everything together: the loss of a step is the sum of what the ranks computed, every
collective is differentiated as what it is (a gather's gradient is a scatter of sums), and a
parameter's gradient is the sum over all ranks. So layouts compose without special cases.

Read ``mesh`` (who is who), ``collectives``, ``data`` (FSDP2, over all ranks), ``expert``,
``tensor``, ``context``, ``recompute``, ``apply`` (their order), ``launch``.
"""

from __future__ import annotations

from qnext.parallel.apply import Alone, Ranks, parallelise
from qnext.parallel.mesh import Mesh, ParallelConfig

__all__ = ["Alone", "Mesh", "ParallelConfig", "Ranks", "parallelise"]
