"""The cache: KV blocks and DeltaNet states behind one door, CacheManager (manager.py).

entries.py has the words. blocks.py and states.py count, index.py knows which prefixes are there,
memory.py joins them with the tensors. attach.py restores a prefix, saves.py publishes, policy.py
says which states are worth it, swap.py moves a sequence out and in, check.py what must always hold.
Below the device lie tiers.py and disk_tier.py, which spill.py fills and asks.
"""

from qnext.engine.cache.disk_tier import DiskTier
from qnext.engine.cache.manager import CacheManager
from qnext.engine.cache.stats import CacheStats
from qnext.engine.cache.swap import SwappedState
from qnext.engine.cache.tensors import CacheTensors, Tensors
from qnext.engine.cache.tiers import HostTier, Tier, TierStats

__all__ = [
    "CacheManager",
    "CacheStats",
    "CacheTensors",
    "DiskTier",
    "HostTier",
    "SwappedState",
    "Tensors",
    "Tier",
    "TierStats",
]
