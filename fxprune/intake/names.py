"""Names of modules, and which of them a user's patterns mean."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fxprune.errors import OptionsError


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module name, or that of a module around it, matches one of the names or fnmatch patterns."""
    parts = name.split(".")
    enclosing = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in enclosing)


def check_exclude(model: nn.Module, exclude: Sequence[str]) -> None:
    """Raise OptionsError for a pattern that matches no module: most likely a misspelt name."""
    if isinstance(exclude, str):
        raise OptionsError(f"exclude takes a sequence of names; write exclude=({exclude!r},)")
    names = [name for name, _ in model.named_modules() if name]
    inside = [f"{name}." * bool(name) + own for name, module in model.named_modules() for own in _written_out(module)]
    for pattern in exclude:
        if not isinstance(pattern, str):
            raise OptionsError(f"exclude takes names of modules, such as {names[:1]}, not {pattern!r}")
        if not any(fnmatchcase(name, pattern) for name in (*names, *inside)):
            raise OptionsError(
                f"exclude: {pattern!r} matches no module of {type(model).__name__}; "
                f"names look like {', '.join(map(repr, names[:5]))}"
            )


def _written_out(module: nn.Module) -> list[str]:
    """The layers that a module of torch becomes, under which the report has its matrices."""
    if isinstance(module, nn.MultiheadAttention):
        return ["q_proj", "k_proj", "v_proj"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1]
    return []
