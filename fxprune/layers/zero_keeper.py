"""Keeper: holds weights at zero while a module is trained, whatever the optimizer.

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from fxprune.errors import GraphError
from fxprune.graph.model_argument import not_a_model


class KeptLayer:
    """One layer, and which of its weights stay zero.

    Args:
        module: a Conv or Linear module.
        zeros: bool, of the weight's shape.
    """

    def __init__(self, module: nn.Module, zeros: Tensor) -> None:
        self.module = module
        self.zeros = zeros.detach()
        self._hook: RemovableHandle | None = None

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
        hooks = {} if weight is None else weight._backward_hooks or {}
        hooked = self._hook is not None and self._hook.id in hooks
        if weight is None or not weight.requires_grad or hooked:
            return
        self.unhook_gradient()
        self._hook = weight.register_hook(_gradient_mask(weakref.ref(self)))

    def unhook_gradient(self) -> None:
        """Let gradients through again."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None


class Keeper:
    """Keeps the zeros of some layers; a module's hooks hold it, and it is copied and pickled with them.

    It refers to the layers, never to the module around them: a GraphModule that is reached from its own attributes cannot
    be pickled.
    """

    def __init__(self, layers: list[KeptLayer]) -> None:
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


def _gradient_mask(kept: weakref.ref[KeptLayer]) -> Callable[[Tensor], Tensor | None]:
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
    for keeper in list(keepers(module)):
        for hooks in _hook_tables(module):
            for key in [key for key, hook in hooks.items() if keeper_of(hook) is keeper]:
                del hooks[key]
        attach(module, keeper)


def let_go(module: nn.Module) -> None:
    """Take the keepers off a module; of those inside it, none."""
    for hooks in _hook_tables(module):
        for key in [key for key, hook in hooks.items() if keeper_of(hook)]:
            keeper = keeper_of(hooks.pop(key))
            if keeper is not None:
                keeper.release()


def write_kept_zeros(module: nn.Module) -> None:
    """Let the keepers of a module and those inside it write their zeros, for somebody who is about to read the weights.

    Raises:
        GraphError: it is no module.
    """
    if not isinstance(module, nn.Module):
        raise GraphError(not_a_model(module))
    for inner in module.modules():
        for keeper in keepers(inner):
            keeper.write()


def keepers(module: nn.Module) -> Iterator[Keeper]:
    """The keepers that a module itself holds."""
    return (keeper for hook in module._load_state_dict_post_hooks.values() if (keeper := keeper_of(hook)))


def keeper_of(hook: object) -> Keeper | None:
    """The keeper that a module's hook belongs to; None for a hook of somebody else's."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Keeper) else None


def _hook_tables(module: nn.Module) -> Iterable[dict[int, Any]]:
    return module._forward_pre_hooks, module._state_dict_pre_hooks, module._load_state_dict_post_hooks
