"""SparseGPT (Frantar & Alistarh 2023, algorithm 1), as published, for N:M and unstructured patterns.

Columns are pruned from left to right. Each pruned weight's error is compensated by the columns still to come, by the
OBS update; the inverse Hessians of all the shrinking column sets are rows of one upper Cholesky factor of H^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.pattern import NMPattern, Pattern, UnstructuredPattern
from fxprune.solvers.problem import LayerProblem


def sparsegpt(problem: LayerProblem, pattern: Pattern, *, block_size: int = 128) -> Tensor:
    """Prune W* = T H^-1 (the dense weights themselves for the published target); returns (R, D).

    Args:
        problem: damped layer problem.
        pattern: N:M masks are chosen at each group's first column, unstructured ones at each block's.
        block_size: columns B of a lazy block; updates right of the block are one matrix product.
    """
    weight = problem.optimum()
    upper = problem.once("inverse factor", lambda: inverse_factor(problem.hessian))
    rows, columns = weight.shape
    if isinstance(pattern, NMPattern):
        block_size = -(-block_size // pattern.m) * pattern.m
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = weight[:, start:stop]  # A view: what is written here is written in `weight`.
        factor = upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        keep = _block_mask(pattern, block, factor, rows * start, rows * columns)
        for j in range(stop - start):
            if isinstance(pattern, NMPattern) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                keep[:, group] = pattern.mask(_scores(block[:, group], factor.diagonal()[group]))
            pruned = block[:, j] * ~keep[:, j]
            errors[:, j] = pruned / factor[j, j]
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
            block[:, j] *= keep[:, j]  # Exactly zero, not zero up to rounding.
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor U of H^-1 = U^T U, (D, D).

    H^-1 is never formed: with H = L L^T taken on the reversed columns, U is the reversed L^-1.
    """
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def _scores(weight: Tensor, diagonal: Tensor) -> Tensor:
    """OBS saliency w_j^2 / [H^-1]_jj of a weight among the columns that are left."""
    return (weight / diagonal) ** 2


def _block_mask(pattern: Pattern, block: Tensor, factor: Tensor, done: int, total: int) -> Tensor:
    """Unstructured: the block's mask, its share such that all blocks together keep what the pattern keeps."""
    keep = torch.ones_like(block, dtype=torch.bool)
    if isinstance(pattern, UnstructuredPattern):
        kept = pattern.kept(done + block.numel()) - pattern.kept(done)
        chosen = _scores(block, factor.diagonal()).flatten().topk(kept, sorted=False).indices
        keep = torch.zeros(block.numel(), dtype=torch.bool, device=block.device)
        keep = keep.scatter_(0, chosen, True).reshape(block.shape)
    return keep
