"""One graph pass a file. A pass takes a GraphModule, changes it in place and says whether it did."""

from __future__ import annotations

from torch.fx.passes.infra.pass_base import PassResult

from fxprune.annotations import Change, changes
from fxprune.passes.allocate import Allocate
from fxprune.passes.base import CalibratedPass, Pass
from fxprune.passes.check_hooks import CheckHooks
from fxprune.passes.check_images import CheckImages
from fxprune.passes.fold_batchnorm import FoldBatchNorm
from fxprune.passes.insert_observers import InsertObservers
from fxprune.passes.permute_channels import PermuteChannels
from fxprune.passes.polish import KeepDense, Polish
from fxprune.passes.reestimate_batchnorm import ReestimateBatchNorm
from fxprune.passes.remove_channels import RemoveChannels
from fxprune.passes.remove_inplace import RemoveInplace
from fxprune.passes.remove_observers import RemoveObservers
from fxprune.passes.shortcuts_first import ShortcutsFirst
from fxprune.passes.solve_layers import SolveLayers
from fxprune.passes.to_semi_structured import ToSemiStructured
from fxprune.passes.unroll_recurrent import RollUpRecurrent, UnrollRecurrent
from fxprune.passes.verify import verify

__all__ = [
    "Allocate",
    "CalibratedPass",
    "Change",
    "CheckHooks",
    "CheckImages",
    "FoldBatchNorm",
    "InsertObservers",
    "KeepDense",
    "Pass",
    "PassResult",
    "PermuteChannels",
    "Polish",
    "ReestimateBatchNorm",
    "RemoveChannels",
    "RemoveInplace",
    "RemoveObservers",
    "RollUpRecurrent",
    "ShortcutsFirst",
    "SolveLayers",
    "ToSemiStructured",
    "UnrollRecurrent",
    "changes",
    "verify",
]
