"""`python -m fxprune`, and the `fxprune` command."""

from __future__ import annotations

from fxprune.runtime.interrupt import leave_at_once


def main() -> None:
    """Run the command line."""
    leave_at_once()
    from fxprune.cli import app

    app(prog_name="fxprune")


if __name__ == "__main__":
    main()
