"""How fast and how small: statistics, whole compilations, growth, ResNet-50. `python -m benchmarks.speed --help`."""

from __future__ import annotations
