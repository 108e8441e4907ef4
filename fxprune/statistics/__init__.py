"""What observers gather about a layer's input and wanted output, and fast ways to compute it."""

from __future__ import annotations

from fxprune.statistics.accumulators import CrossStatistics, HessianObserver, InputStatistics
from fxprune.statistics.moments import Centred, Moments
from fxprune.statistics.pool import Pool

__all__ = ["Centred", "CrossStatistics", "HessianObserver", "InputStatistics", "Moments", "Pool"]
