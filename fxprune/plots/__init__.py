"""Pictures of results, reports and weights. They need matplotlib: ``pip install 'fxprune[plot]'``."""

from __future__ import annotations

from fxprune.plots.layers import layer_sparsity_and_error
from fxprune.plots.masks import mask_pictures
from fxprune.plots.report_file import read_report
from fxprune.plots.results import accuracy_against_sparsity, has_level, method_comparison
from fxprune.plots.scan import costs_at_the_output
from fxprune.plots.spectra import singular_value_spectra
from fxprune.plots.style import save_figure

__all__ = [
    "accuracy_against_sparsity",
    "costs_at_the_output",
    "has_level",
    "layer_sparsity_and_error",
    "mask_pictures",
    "method_comparison",
    "read_report",
    "save_figure",
    "singular_value_spectra",
]
