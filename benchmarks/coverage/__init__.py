"""The coverage table: which networks go through every stage, and how much of them is pruned."""

from __future__ import annotations
