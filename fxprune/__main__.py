"""`python -m fxprune` is the command line."""

from __future__ import annotations

from fxprune.cli import app

if __name__ == "__main__":
    app(prog_name="fxprune")
