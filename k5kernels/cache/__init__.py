"""Caching over sampling steps: which passes run their blocks, and what stands in for them where they do not."""

from k5kernels.cache.apply import CachedBlocks, apply
from k5kernels.cache.magcache import MagCache, MagCalibration, Policy
from k5kernels.cache.report import CacheReport

__all__ = ["CacheReport", "CachedBlocks", "MagCache", "MagCalibration", "Policy", "apply"]
