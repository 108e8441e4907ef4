"""`python -m fxprune` is the command line."""

from __future__ import annotations

from fxprune.cli import app

app(prog_name="fxprune")
