"""Frame-level autoregressive reconstruction: masked attention, predictor, towers, the module, rollout, training.

Public names are resolved on first use, so that a part is imported without the others. Functions that are called like
their module (`rollout.rollout`, `evaluate.evaluate`) are imported from there.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attention import frame_attention as frame_attention
    from .autoregressive_reconstruction import AutoregressiveReconstruction as AutoregressiveReconstruction
    from .autoregressive_reconstruction import ReconstructionConfig as ReconstructionConfig
    from .autoregressive_reconstruction import ReconstructionOutput as ReconstructionOutput
    from .autoregressive_reconstruction import (
        create_autoregressive_reconstruction_module as create_autoregressive_reconstruction_module,
    )
    from .evaluate import Evaluation as Evaluation
    from .predictor import FramePredictor as FramePredictor
    from .rollout import RolloutOutput as RolloutOutput
    from .towers import PixelTower as PixelTower
    from .towers import Tower as Tower
    from .towers import TowerAdapter as TowerAdapter
    from .towers import as_tower as as_tower
    from .trainer import TrainSettings as TrainSettings
    from .trainer import train as train
    from .video_frame_utils import FrameLevelMaskGenerator as FrameLevelMaskGenerator
    from .video_frame_utils import VideoFrameSampler as VideoFrameSampler

_HOME = {
    "attention": "frame_attention",
    "autoregressive_reconstruction": "AutoregressiveReconstruction ReconstructionConfig ReconstructionOutput "
    "create_autoregressive_reconstruction_module",
    "evaluate": "Evaluation",
    "predictor": "FramePredictor",
    "rollout": "RolloutOutput",
    "towers": "PixelTower Tower TowerAdapter as_tower",
    "trainer": "TrainSettings train",
    "video_frame_utils": "FrameLevelMaskGenerator VideoFrameSampler",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
