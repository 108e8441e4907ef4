"""One graph pass a file. A pass takes a GraphModule, changes it in place and says whether it did."""

from __future__ import annotations

from torch.fx.passes.infra.pass_base import PassResult

from fxprune.passes.allocate_sparsity import AllocateSparsity
from fxprune.passes.base import Change, Pass, changes
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.passes.insert_observers import InsertObservers
from fxprune.passes.low_rank import LowRank
from fxprune.passes.permute_channels import PermuteChannels
from fxprune.passes.polish import Polish
from fxprune.passes.prune_weights import PruneWeights
from fxprune.passes.reestimate_batchnorm import ReestimateBatchNorm
from fxprune.passes.remove_inplace import RemoveInplace
from fxprune.passes.remove_observers import RemoveObservers
from fxprune.passes.to_semi_structured import ToSemiStructured
from fxprune.passes.verify import verify

__all__ = [
    "AllocateSparsity",
    "Change",
    "FoldBatchNorm",
    "InsertObservers",
    "LowRank",
    "Pass",
    "PassResult",
    "PermuteChannels",
    "Polish",
    "PruneWeights",
    "ReestimateBatchNorm",
    "RemoveInplace",
    "RemoveObservers",
    "ToSemiStructured",
    "changes",
    "verify",
]
