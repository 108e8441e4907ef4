"""Names of a package that are imported when they are first used, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any


def on_first_use(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names live in modules that are imported later.

    Beside the names given, every submodule of the package is there as an attribute.

    Args:
        package: its `__name__`.
        places: for each name, the module that holds it. A name must not be that of a submodule: whoever imports the
            submodule would put the module in the name's place.

    Example:
        >>> import fxprune
        >>> fxprune.Pattern is fxprune.pattern.Pattern
        True
    """

    def get(name: str) -> Any:
        if name in places:
            value = getattr(importlib.import_module(places[name]), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        found = vars(sys.modules[package])
        return sorted({*found, *found.get("__all__", ()), *places})

    return get, names
