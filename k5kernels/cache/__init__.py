"""Caching over sampling steps."""

from k5kernels.cache.magcache import MagCache, MagCalibration

__all__ = ["MagCache", "MagCalibration"]
