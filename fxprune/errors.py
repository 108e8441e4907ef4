"""Every error that fxprune raises on purpose; each message names the thing, what was found and what to do.

Errors about an argument are ValueErrors too.
"""

from __future__ import annotations


class FxPruneError(Exception):
    """Base class of all errors raised by fxprune."""


class TraceError(FxPruneError):
    """The model could not be traced by torch.fx."""


class OnnxImportError(TraceError):
    """An ONNX file holds something that cannot be taken in as a model."""


class NoGraphError(TraceError):
    """No way leads to one graph of the whole model; parts of it may be graphs."""


class PatternError(FxPruneError, ValueError):
    """A sparsity pattern cannot be parsed, or does not fit a weight."""


class CalibrationError(FxPruneError, ValueError):
    """The calibration set is empty, has the wrong form, or holds NaN or infinite values."""


class CalibrationWarning(UserWarning):
    """The calibration images do not look right: few, constant, or unlike those that the model was trained on."""


class SolverError(FxPruneError):
    """A layer's least-squares problem could not be solved."""


class GraphError(FxPruneError):
    """A graph does not satisfy what a pass requires or ensures."""


class OptionsError(FxPruneError, ValueError):
    """An argument or option is unknown, has a value outside its range, or contradicts another."""


class ModelError(FxPruneError):
    """A named model cannot be built or registered as asked."""


class UnknownModelError(ModelError, ValueError):
    """No model has this name."""


class CheckpointError(FxPruneError):
    """A weights file cannot be read, or does not fit the model."""


class DataError(FxPruneError):
    """A data set is unknown, absent, malformed, or too small for what is asked of it."""


class DataWarning(UserWarning):
    """A data set is not quite what was asked for, and is used as it is."""


class EvaluationError(FxPruneError):
    """A model cannot be scored on the batches given."""


class EvaluationWarning(UserWarning):
    """A model was scored, and the score is what guessing gives."""


class ExportError(FxPruneError):
    """A model cannot be exported, or its file cannot be written."""


class ValidationError(FxPruneError):
    """An ONNX file does not hold, or does not compute, what it should."""


class ProcessError(FxPruneError):
    """One of several processes that work together has failed, or was given something else than the others."""
