"""Frame-level autoregressive reconstruction: masked attention, predictor, towers, the module, rollout, training.

Public names are resolved on first use, so that a part is imported without the others. Functions that are called like
their module (`rollout.rollout`, `evaluate.evaluate`) are imported from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from framestream.pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from .attention import frame_attention as frame_attention
    from .autoregressive_reconstruction import AutoregressiveReconstruction as AutoregressiveReconstruction
    from .autoregressive_reconstruction import ReconstructionConfig as ReconstructionConfig
    from .autoregressive_reconstruction import ReconstructionOutput as ReconstructionOutput
    from .autoregressive_reconstruction import (
        create_autoregressive_reconstruction_module as create_autoregressive_reconstruction_module,
    )
    from .evaluate import Evaluation as Evaluation
    from .feature_cache import FeatureCache as FeatureCache
    from .generation import FrameGenerator as FrameGenerator
    from .generation import GeneratedFrame as GeneratedFrame
    from .generation import generate_frames as generate_frames
    from .hf_trainer import AutoregressiveTrainer as AutoregressiveTrainer
    from .patch_basis import CosineTower as CosineTower
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
    "generation": "FrameGenerator GeneratedFrame generate_frames",
    "feature_cache": "FeatureCache",
    "hf_trainer": "AutoregressiveTrainer",
    "patch_basis": "CosineTower",
    "predictor": "FramePredictor",
    "rollout": "RolloutOutput",
    "towers": "PixelTower Tower TowerAdapter as_tower",
    "trainer": "TrainSettings train",
    "video_frame_utils": "FrameLevelMaskGenerator VideoFrameSampler",
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOME)
