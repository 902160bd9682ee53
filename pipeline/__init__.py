"""Video in shards to batches for frame-level autoregressive models.

Public names are resolved on first use, so that importing the package costs nothing and the pure parts (sampling,
layout, masks, order) need only torch and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_exports

if TYPE_CHECKING:
    from .collate import ClipCollator as ClipCollator
    from .dataset import ClipDataset as ClipDataset
    from .decode import Decoder as Decoder
    from .decode import available_backends as available_backends
    from .decode import open_decoder as open_decoder
    from .errors import ConfigError as ConfigError
    from .errors import DecodeError as DecodeError
    from .errors import FramestreamError as FramestreamError
    from .errors import LeakError as LeakError
    from .errors import RejectLimitError as RejectLimitError
    from .errors import SampleError as SampleError
    from .errors import ShardError as ShardError
    from .errors import StateError as StateError
    from .errors import WorkerError as WorkerError
    from .frameworks import FrameworkLoader as FrameworkLoader
    from .frameworks import LoaderTrainerMixin as LoaderTrainerMixin
    from .layout import FrameLayout as FrameLayout
    from .layout import frame_position_ids as frame_position_ids
    from .layout import next_frame_targets as next_frame_targets
    from .loader import ClipLoader as ClipLoader
    from .loader import build_loader as build_loader
    from .mask_rule import FrameRule as FrameRule
    from .masks import FrameMask as FrameMask
    from .masks import fast_slow as fast_slow
    from .masks import fast_slow_causal as fast_slow_causal
    from .masks import frame_causal as frame_causal
    from .masks import full as full
    from .masks import leaking_targets as leaking_targets
    from .masks import make_mask as make_mask
    from .masks import sliding_window as sliding_window
    from .masks import time_causal as time_causal
    from .order import SampleOrder as SampleOrder
    from .probe import VideoInfo as VideoInfo
    from .probe import probe_video as probe_video
    from .sampling import DenseSampling as DenseSampling
    from .sampling import FastSlowSampling as FastSlowSampling
    from .sampling import Sampling as Sampling
    from .sampling import SamplingPlan as SamplingPlan
    from .sampling import make_sampling as make_sampling
    from .sampling import sampling_for_length as sampling_for_length
    from .shard_writer import ShardWriter as ShardWriter
    from .shards import RawSample as RawSample
    from .shards import ShardSet as ShardSet
    from .transforms import ClipTransform as ClipTransform

_HOME = {
    "collate": "ClipCollator",
    "dataset": "ClipDataset",
    "decode": "Decoder available_backends open_decoder",
    "errors": "ConfigError DecodeError FramestreamError LeakError RejectLimitError SampleError ShardError StateError "
    "WorkerError",
    "frameworks": "FrameworkLoader LoaderTrainerMixin",
    "layout": "FrameLayout frame_position_ids next_frame_targets",
    "loader": "ClipLoader build_loader",
    "mask_rule": "FrameRule",
    "masks": "FrameMask fast_slow fast_slow_causal frame_causal full leaking_targets make_mask sliding_window "
    "time_causal",
    "order": "SampleOrder",
    "probe": "VideoInfo probe_video",
    "sampling": "DenseSampling FastSlowSampling Sampling SamplingPlan make_sampling sampling_for_length",
    "shard_writer": "ShardWriter",
    "shards": "RawSample ShardSet",
    "transforms": "ClipTransform",
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOME)
