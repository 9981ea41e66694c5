"""Callbacks that watch or write, and never change a gradient."""

from lit_align.callbacks.checkpoint import RunCheckpoint
from lit_align.callbacks.checkpoint_io import AtomicCheckpointIO
from lit_align.callbacks.completions import CompletionsTable
from lit_align.callbacks.divergence import Diverged, DivergenceGuard
from lit_align.callbacks.ema import WeightEMA
from lit_align.callbacks.export_model import HFExport
from lit_align.callbacks.manifest import Manifest
from lit_align.callbacks.metrics_csv import MetricsCSV
from lit_align.callbacks.normalize import NormalizeReward
from lit_align.callbacks.predictions import PredictionsFile
from lit_align.callbacks.progress import ProgressLines, progress
from lit_align.callbacks.save_config import SaveRunConfig
from lit_align.callbacks.throughput import Throughput

__all__ = [
    "AtomicCheckpointIO",
    "CompletionsTable",
    "Diverged",
    "DivergenceGuard",
    "HFExport",
    "Manifest",
    "MetricsCSV",
    "NormalizeReward",
    "PredictionsFile",
    "ProgressLines",
    "RunCheckpoint",
    "SaveRunConfig",
    "Throughput",
    "WeightEMA",
    "progress",
]
