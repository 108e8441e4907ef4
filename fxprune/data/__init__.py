"""Data sets by name or path, and the calibration images drawn from them."""

from __future__ import annotations

from fxprune.data.array_dataset import ArrayDataset, make_loader
from fxprune.data.loading import DataInfo, DataSplits, list_data, load_data
from fxprune.data.npz_files import load_npz
from fxprune.data.sampling import calibration_loader, calibration_split, calibration_tensors

__all__ = [
    "ArrayDataset",
    "DataInfo",
    "DataSplits",
    "calibration_loader",
    "calibration_split",
    "calibration_tensors",
    "list_data",
    "load_data",
    "load_npz",
    "make_loader",
]
