"""Constraints under which layers are solved; one file each, read from a recipe by its `parse`."""

from __future__ import annotations

from fxprune.layers.constraint import (
    CONSTRAINTS,
    Chain,
    Constraint,
    Part,
    Rest,
    chain_text,
    keep_possible,
    parse_chain,
    register,
)

__all__ = [
    "CONSTRAINTS",
    "Chain",
    "Constraint",
    "Part",
    "Rest",
    "chain_text",
    "keep_possible",
    "parse_chain",
    "register",
]
