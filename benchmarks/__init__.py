"""What is measured, how, and the last figures; README.md lists the commands."""

from __future__ import annotations
