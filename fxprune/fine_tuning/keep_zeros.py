"""keep_zeros(): a pruned model stays pruned while it is trained."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from fxprune.errors import GraphError
from fxprune.fine_tuning.recorded_zeros import filled_zeros, layers_with_zeros, recorded_masks
from fxprune.layers.zero_keeper import Keeper, KeptLayer, attach, keepers, let_go


class KeptZeros:
    """The handle of `keep_zeros`: `.remove()` lets the zeros go, and so does leaving the `with` block that it began.

    Attributes:
        layers: the number of zeros kept in each layer.
    """

    def __init__(self, module: nn.Module, layers: dict[str, int], *, began: bool) -> None:
        self.layers = layers
        self._module = module
        self._began = began

    def remove(self) -> None:
        """Keep the zeros no longer; a second call does nothing."""
        let_go(self._module)

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._began:
            self.remove()

    def __repr__(self) -> str:
        return f"KeptZeros({sum(self.layers.values()):,} zeros in {len(self.layers)} layers)"


def keep_zeros(module: nn.Module) -> KeptZeros:
    """Keep the zeros of a pruned model while it is trained.

    It works with any optimizer, made before or after this call; with autocast and GradScaler, gradient accumulation, averaged
    models, DataParallel and DistributedDataParallel (call it before wrapping or after), torch.compile, `.to()` and `.half()`.
    A deep copy of the module keeps its zeros too. What is loaded with `load_state_dict` gets the zeros.

    Args:
        module: what `fxprune.compile` or `fxprune.load` returned, or a module around it: the zeros of its pruned layers are
            kept. Of any other module, such as one of your own class with the pruned weights, the zeros of all Conv and Linear
            weights, except those that are zero throughout.

    Returns:
        A handle, which need not be kept: `.remove()` ends it. It is a context manager too; inside a module that keeps its zeros
        already, the end of the `with` block changes nothing. To end it in a copy, call `keep_zeros(copy).remove()`.

    Raises:
        GraphError: the module has no zeros to keep, or they have been filled in.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> layer.weight.data[:, :2] = 0
        >>> with keep_zeros(layer):
        ...     optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        ...     layer(torch.ones(3, 4)).sum().backward()
        ...     optimizer.step()
        >>> int((layer.weight == 0).sum())
        4
    """
    if filled := filled_zeros(module):
        raise GraphError(f"there is nothing left to keep in {', '.join(filled.layers)}: {filled}")
    names = recorded_masks(module)
    chosen = dict(layers_with_zeros(module))
    if names:
        chosen = {name: layer for name, layer in chosen.items() if name in names}
    if not chosen:
        raise GraphError(
            f"{type(module).__name__} has no zeros to keep: no weight of a Conv or Linear layer is zero in part; "
            "prune it with fxprune.compile, or load the pruned weights, before keep_zeros"
        )
    layers = [KeptLayer(layer, layer.weight == 0) for layer in chosen.values()]
    counts = {name: int(kept.zeros.sum()) for name, kept in zip(chosen, layers, strict=True)}
    began = next(keepers(module), None) is None
    handle = KeptZeros(module, counts, began=began)
    handle.remove()
    attach(module, Keeper(layers))
    return handle
