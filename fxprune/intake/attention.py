"""nn.MultiheadAttention written out: three projections, scaled dot-product attention and an output projection.

torch's module keeps the three projections in one parameter and calls one function on everything, so its weights belong to
no layer. Here each is an nn.Linear that the tracer sees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune.graph import has_hooks
from fxprune.intake.names import matches
from fxprune.intake.origins import Origin
from fxprune.layers.recurrent import linear


def is_there(model: nn.Module, exclude: tuple[str, ...] = ()) -> bool:
    """Whether a model has attention that `write_out` would replace."""
    return any(_is_replaceable(m) and not matches(path, exclude) for path, m in model.named_modules())


def write_out(model: nn.Module, exclude: tuple[str, ...] = ()) -> tuple[nn.Module, dict[str, Origin]]:
    """Replace every nn.MultiheadAttention of a model, in place, and say where the new weights come from.

    Attention with biases added to keys and values, or with an extra position of zeros, stays as it is, as do excluded
    modules and subclasses.
    """
    found: dict[str, Origin] = {}
    made: dict[nn.Module, Attention] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.MultiheadAttention) or not _is_replaceable(module) or matches(path, exclude):
            continue
        if module not in made:
            made[module] = Attention(module)
        if not path:
            model = made[module]
        else:
            model.set_submodule(path, made[module])
        found |= _origins(module, f"{path}." if path else "")
    return model, found


class Attention(nn.Module):
    """Computes what an nn.MultiheadAttention computes in eval mode; it is traced, and never part of a graph itself."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        width, self.heads, self.batch_first = module.embed_dim, module.num_heads, module.batch_first
        if module._qkv_same_embed_dim:
            weights: list[Tensor] = list(module.in_proj_weight.detach().split(width))
        else:
            weights = [module.q_proj_weight.detach(), module.k_proj_weight.detach(), module.v_proj_weight.detach()]
        biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.detach().split(width))
        layers = [linear(weight.clone(), bias) for weight, bias in zip(weights, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = layers
        self.out_proj = linear(module.out_proj.weight, module.out_proj.bias)
        self.training = module.training

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # A hint only: the mask is there too.
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (L, N, E), (N, L, E) with `batch_first`, or (L, E)."""
        q = self._split(self.q_proj(query))
        k = self._split(self.k_proj(key))
        v = self._split(self.v_proj(value))
        mask = self._mask(attn_mask, key_padding_mask, q)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.out_proj(self._ordered(y.transpose(-2, -3).flatten(-2)))
        if not need_weights:
            return y, None
        scores = (q * (q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return y, weights.mean(-3) if average_attn_weights else weights

    def _ordered(self, x: Tensor) -> Tensor:
        """Batch first from positions first, or back; a single sequence (L, E) as it is."""
        return x if self.batch_first else x.transpose(0, -2)

    def _split(self, x: Tensor) -> Tensor:
        """(N, L, heads * D) or (L, heads * D) -> (..., heads, L, D)."""
        split: Tensor = self._ordered(x).unflatten(-1, (self.heads, -1))
        return split.transpose(-2, -3)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Any:
        """What is added to the scores."""
        if attention is not None:
            attention = _added(attention, like)
            if attention.dim() == 3:
                attention = attention.unflatten(0, (-1, self.heads))
        if padding is None:
            return attention
        padding = _added(padding, like)[..., None, None, :]
        return padding if attention is None else attention + padding


def drop_unread_weights(graph_module: GraphModule) -> None:
    """Take attention weights that nobody reads out of a graph, as the module gives them unless it is told not to."""
    for node in reversed(list(graph_module.graph.nodes)):
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if stack and stack[-1][1] is Attention and not node.users and node.op != "call_module":
            graph_module.graph.erase_node(node)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _is_replaceable(module: nn.Module) -> bool:
    plain = type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
    return plain and not has_hooks(module)


def _origins(module: nn.MultiheadAttention, prefix: str) -> dict[str, Origin]:
    found = {}
    for i, letter in enumerate("qkv"):
        rows = (i * module.embed_dim, (i + 1) * module.embed_dim)
        if module._qkv_same_embed_dim:
            found[f"{prefix}{letter}_proj.weight"] = Origin((f"{prefix}in_proj_weight",), "rows", rows)
        else:
            found[f"{prefix}{letter}_proj.weight"] = Origin((f"{prefix}{letter}_proj_weight",))
        if module.in_proj_bias is not None:
            found[f"{prefix}{letter}_proj.bias"] = Origin((f"{prefix}in_proj_bias",), "rows", rows)
    return found
