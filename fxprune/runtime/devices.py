"""Where to compute: a device by its name, checked before anything is read."""

from __future__ import annotations

import torch

from fxprune.errors import OptionsError
from fxprune.runtime.processes import world


def default_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; for None CUDA where there is one, this process's own among several, else the CPU.

    Raises:
        OptionsError: there is no such device, or it cannot compute.
    """
    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda" if world().count == 1 else f"cuda:{torch.cuda.current_device()}")
    return checked_device(device)


def checked_device(device: torch.device | str) -> torch.device:
    """The device of this name, which has computed something.

    Raises:
        OptionsError: there is no such device, or it cannot compute.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise OptionsError(f"there is no device {device!r}; write cpu, cuda, or cuda:1 for the second GPU") from error
    remedy = "leave the device out to compute where that is possible, or take cpu"
    if place.type == "meta":
        raise OptionsError(f"the device {device!r} holds no values to compute with; {remedy}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise OptionsError(
            f"the device {device!r} cannot be used: torch finds no GPU here, because the driver or a torch built for "
            f"CUDA is missing; {remedy}"
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise OptionsError(f"there is no device {device!r}: GPUs are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    try:
        torch.ones(1, device=place).sum().item()
    except Exception as error:  # what a backend that is not there raises is up to the backend
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise OptionsError(f"the device {device!r} cannot be used: {reason[0].split('. ')[0]}; {remedy}") from error
    return place
