"""What was passed where a model is expected, in words: a state dict, a path or a class is an easy mistake."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn


def not_a_model(value: object) -> str:
    """The sentence for an error about something that is no `torch.nn.Module`: what it is, and the remedy.

    No values are printed: a state dict's are thousands of lines.
    """
    kind = type(value).__name__
    if isinstance(value, Mapping):
        names = [str(name) for name in list(value)[:2]]
        held = f" with {', '.join(names)}, ..." if names else ""
        if any(isinstance(item, Tensor) for item in value.values()):
            return (
                f"expected a torch.nn.Module, got a state dict ({kind}{held}): weights alone do not say what is "
                "computed. Build the model, call model.load_state_dict(...) with it, and pass the model"
            )
        return (
            f"expected a torch.nn.Module, got a {kind}{held}. If that is a training checkpoint, build the model, call "
            "model.load_state_dict(...) with the weights in it, and pass the model"
        )
    if isinstance(value, (str, Path)):
        return (
            f"expected a torch.nn.Module, got {str(value)!r} ({kind}). fxprune.load reads a file of fxprune.save; for "
            "other files build the model and load its weights"
        )
    if isinstance(value, type) and issubclass(value, nn.Module):
        return (
            f"expected a torch.nn.Module, got the class {value.__name__}; pass an instance of it: {value.__name__}(...)"
        )
    if isinstance(value, type):
        return f"expected a torch.nn.Module, got the class {value.__name__}"
    return f"expected a torch.nn.Module, got {'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"
