"""Names the machine that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device | str = "cpu") -> str:
    """The processor (and GPU) in words, with torch's version and the number of its threads."""
    found = f"{processor()}, {os.cpu_count()} cores; torch {torch.__version__}, {torch.get_num_threads()} threads"
    if torch.device(device).type == "cuda":
        found = f"{torch.cuda.get_device_name(device)}; {found}"
    return found


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
