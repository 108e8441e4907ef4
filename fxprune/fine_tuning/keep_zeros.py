"""keep_zeros(): a pruned model stays pruned while it is trained, whatever the optimizer.

Two things together keep the zeros, because neither does so alone:

- *Gradients are masked* (a hook on each weight, before the gradient is accumulated). Momentum, Adam's moments, LBFGS's
  directions, SAM's perturbation and gradient clipping then see the pruned network's gradient only, and DDP averages that one.
  A weight of zero with a gradient of zero stays zero in all of them, weight decay included. But an optimizer may have a
  state from before, may add noise, or may mix coordinates (Muon, Shampoo).
- *Weights are masked after every step* of any `torch.optim.Optimizer` (a global hook of torch's), before every forward pass
  of the module, before its state_dict is taken and after one is loaded: what the first leaves open, those close, optimizers
  outside torch included. Without the first, momentum would push against the mask, and LBFGS would look for a step among
  networks that are not pruned.

A parametrization (weight = original * mask) would do the same, but it renames the parameters: state dicts no longer fit, files
cannot be saved, and exported graphs multiply by the mask. Masks are applied with masked_fill, not by multiplying: 0 * inf is
NaN, and a GradScaler skips steps for one of those. They are bool, so dtypes do not matter, and follow a weight to its device.

Nothing is added to the state dict, to the graph, or to what torch.export, torch.onnx and torch.compile trace: the forward hook
stands aside there.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fxprune.errors import GraphError
from fxprune.fine_tuning.recorded_zeros import filled_zeros, layers_with_zeros, recorded_masks


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
        for hooks in _hook_tables(self._module):
            for key in [key for key, hook in hooks.items() if _keeper_of(hook)]:
                keeper = _keeper_of(hooks.pop(key))
                if keeper is not None:
                    keeper.release()

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
    layers = [_KeptLayer(layer, layer.weight == 0) for layer in chosen.values()]
    counts = {name: int(kept.zeros.sum()) for name, kept in zip(chosen, layers, strict=True)}
    began = next(_keepers(module), None) is None
    handle = KeptZeros(module, counts, began=began)
    handle.remove()
    attach(module, Keeper(layers))
    return handle


class _KeptLayer:
    """One layer, and which of its weights stay zero.

    Args:
        module: a Conv or Linear module.
        zeros: bool, of the weight's shape.
    """

    def __init__(self, module: nn.Module, zeros: Tensor) -> None:
        self.module = module
        self.zeros = zeros.detach()
        self._unhook: Callable[[], None] = _nothing
        self._hooked: weakref.ref[Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "zeros": self.zeros}  # A copy's weight has to be hooked anew.

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def weight(self) -> nn.Parameter | None:
        """The weight, unless it is something else than it was: replaced, computed, being traced, on no device."""
        # Not module.weight: under torch.fx that would be recorded, and a copy may be half made.
        weight = self.module.__dict__.get("_parameters", {}).get("weight")
        plain = type(weight) is nn.Parameter and not weight.is_meta
        return weight if plain and weight.shape == self.zeros.shape else None

    def zeros_on(self, device: torch.device) -> Tensor:
        """The mask where it is needed; it stays there."""
        if self.zeros.device != device:
            self.zeros = self.zeros.to(device)
        return self.zeros

    def write(self) -> None:
        """Set the zeros to zero."""
        weight = self.weight
        if weight is not None:
            # Through .data: a graph that was recorded with these zeros stays valid (two forwards, then one backward).
            weight.data.masked_fill_(self.zeros_on(weight.device), 0)

    def hook_gradient(self) -> None:
        """Mask the weight's gradient, unless that is done already."""
        weight = self.weight
        if weight is None or not weight.requires_grad or (self._hooked is not None and self._hooked() is weight):
            return
        self.unhook_gradient()
        self._unhook = weight.register_hook(_gradient_mask(weakref.ref(self))).remove
        self._hooked = weakref.ref(weight)

    def unhook_gradient(self) -> None:
        """Let gradients through again."""
        self._unhook()
        self._unhook, self._hooked = _nothing, None


class Keeper:
    """Keeps the zeros of some layers; a module's hooks hold it, and it is copied and pickled with them.

    It refers to the layers, never to the module around them: a GraphModule that is reached from its own attributes cannot
    be pickled.
    """

    def __init__(self, layers: list[_KeptLayer]) -> None:
        self.layers = layers
        self.watch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Keeper:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.layers = copy.deepcopy(self.layers, memo)
        copied.watch()
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.watch()

    def __del__(self) -> None:
        for layer in self.__dict__.get("layers", ()):
            layer.unhook_gradient()

    def watch(self) -> None:
        """Mask gradients, and write zeros after every optimizer's step."""
        global _step_hook
        if _step_hook is None:
            _step_hook = register_optimizer_step_post_hook(_after_step)
        _watching.add(self)
        self.write()

    def write(self) -> None:
        """Set the zeros to zero; mask the gradients of weights that came later or were frozen before."""
        for layer in self.layers:
            layer.write()
            layer.hook_gradient()

    def release(self) -> None:
        """Keep nothing any longer."""
        _watching.discard(self)
        for layer in self.layers:
            layer.unhook_gradient()
        self.layers = []

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook."""
        if not (torch.compiler.is_compiling() or torch._C._get_tracing_state()):
            self.write()

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """State-dict pre-hook."""
        self.write()

    def after_load(self, module: nn.Module, keys: Any) -> None:
        """Post-hook of load_state_dict."""
        self.write()


_watching: weakref.WeakSet[Keeper] = weakref.WeakSet()
_step_hook: Any = None


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for keeper in list(_watching):
        keeper.write()


def _gradient_mask(kept: weakref.ref[_KeptLayer]) -> Callable[[Tensor], Tensor | None]:
    """A gradient hook that does nothing once the layer's keeper is gone."""

    def mask(gradient: Tensor) -> Tensor | None:
        layer = kept()
        return None if layer is None else gradient.masked_fill(layer.zeros_on(gradient.device), 0)

    return mask


def attach(module: nn.Module, keeper: Keeper) -> None:
    """Let a module's hooks hold a keeper."""
    module.register_forward_pre_hook(keeper.before_forward)
    module.register_state_dict_pre_hook(keeper.before_state_dict)
    module.register_load_state_dict_post_hook(keeper.after_load)


def attach_again(module: nn.Module) -> None:
    """Complete the hooks of a copied GraphModule, which takes along only those of load_state_dict."""
    for keeper in list(_keepers(module)):
        for hooks in _hook_tables(module):
            for key in [key for key, hook in hooks.items() if _keeper_of(hook) is keeper]:
                del hooks[key]
        attach(module, keeper)


def write_kept_zeros(module: nn.Module) -> None:
    """Let the keepers of a module and those inside it write their zeros, for somebody who is about to read the weights."""
    for inner in module.modules():
        for keeper in _keepers(inner):
            keeper.write()


def _keepers(module: nn.Module) -> Iterator[Keeper]:
    """The keepers that a module itself holds."""
    return (keeper for hook in module._load_state_dict_post_hooks.values() if (keeper := _keeper_of(hook)))


def _keeper_of(hook: object) -> Keeper | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Keeper) else None


def _hook_tables(module: nn.Module) -> Iterable[dict[int, Any]]:
    return module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_post_hooks


def _nothing() -> None:
    pass
