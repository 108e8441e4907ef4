"""CheckImages: warns of calibration images that cannot be right; to be run before BatchNorm is folded."""

from __future__ import annotations

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxprune.calibration.calibration import Calibration
from fxprune.calibration.check_images import IMAGES, suspicions
from fxprune.passes.base import CalibratedPass


class CheckImages(CalibratedPass):
    """Changes nothing; what is wrong with the images becomes a `CalibrationWarning` and a line in the report."""

    def calibrate(self, graph_module: GraphModule, calibration: Calibration) -> PassResult:  # noqa: D102
        for sentence in suspicions(graph_module, calibration.head(IMAGES)):
            calibration.warn(sentence)
        return PassResult(graph_module, False)
