"""Frames beyond the end of a clip, one after the other, in memory that the mask bounds and not the number of frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.layout import FrameLayout
from framestream.pipeline.masks import FrameMask

from .continuation import Continuation, beyond_clip, fast_frames
from .frame_stream import FrameStream
from .kv_cache import KVCache
from .mask_choice import limited
from .rollout import check_states, hide_later

if TYPE_CHECKING:
    from .autoregressive_reconstruction import AutoregressiveReconstruction
    from .clips import PreparedClips


class GeneratedFrame(NamedTuple):
    """One frame of each of B clips.

    Attributes:
        embeddings: `[B, P, D]`, P being the patches of a fast frame.
        time: float64 `[B]` seconds, on the clip's own clock.
    """

    embeddings: Tensor
    time: Tensor


class FrameGenerator(Iterator[GeneratedFrame]):
    """Gives one generated frame of each clip at a time; made by `generate_frames`.

    No gradients are recorded, and autocast is as it was when this was made.

    Attributes:
        cache: keys and values that it works from; `cache.nbytes` says how large they are.
    """

    def __init__(
        self,
        module: AutoregressiveReconstruction,
        clips: PreparedClips,
        ways: list[Continuation],
        frame_step: Tensor,
        steps: int | None,
        hidden_states: Tensor | None,
        hidden_time: Tensor | None,
    ) -> None:
        starts = torch.tensor([[way.start] for way in ways], device=clips.time.device)
        # Double precision, so that neighbouring frames stay apart however long this goes on.
        clips = replace(clips, time=clips.time.double())
        self._last_time = clips.time.gather(1, starts)[:, 0]
        self._frame_step = frame_step
        self._steps = steps
        self._made = 0
        patches = clips.layouts[0].patches[ways[0].start]
        if hidden_time is not None:
            # A little earlier than the first generated frame: its time is a sum, and may be a rounding step off.
            hidden_time = hide_later(hidden_time, self._last_time + 0.999 * frame_step)
        self._inference = torch.is_inference_mode_enabled()  # tensors made in it may not be written outside
        device = clips.embeddings.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        with torch.no_grad():
            self._stream = FrameStream(module, clips, ways, patches, frame_step, hidden_states, hidden_time)

    @property
    def cache(self) -> KVCache:
        return self._stream.cache

    def __next__(self) -> GeneratedFrame:
        if self._made == self._steps:
            raise StopIteration
        if self._made:
            with torch.inference_mode(self._inference), torch.no_grad(), torch.autocast(*self._autocast):
                self._stream.feed(self._stream.frame, self._time(self._made), self._frame_step)
        self._made += 1
        return GeneratedFrame(self._stream.frame, self._time(self._made))

    def _time(self, number: int) -> Tensor:
        return self._last_time + number * self._frame_step


def generate_frames(
    module: AutoregressiveReconstruction,
    batch: Mapping[str, Any],
    steps: int | None = None,
    *,
    frame_step: float | None = None,
    mask: str | Callable[..., FrameMask] | None = None,
    window_size: int | None = None,
    hidden_states: Tensor | None = None,
    hidden_time: Tensor | None = None,
) -> FrameGenerator:
    """Goes on with the fast stream of each clip of a batch behind its last true frame, from the model's own output.

    Each generated frame sees what the mask rule shows it in the longer clip: the clip's valid frames with the generated
    ones behind them. What it gives is what parallel passes over that longer clip would give. A frame's keys are
    kept as long as any frame to come may see it: under `sliding_window`, or with `num_hist`, memory and cost of a
    frame stay the same however many there are, and under the other causal rules cost grows by one frame each time, and
    memory in steps.

    Args:
        module: the reconstruction module.
        batch: as for its `forward`, not packed. Every clip needs a valid fast frame to start from.
        steps: frames to generate; None goes on until nobody asks for the next. Without end, and beyond a thousand
            frames, a frame is taken to be out of sight when none of the next dozens sees it; a rule that proves this
            wrong later is refused then.
        frame_step: seconds between generated frames; None: from the last but one fast frame of each clip to its last.
        mask: the rule that the clips' masks were made by, where the module's settings do not say it: a mask shows how
            frames of the clip see each other, and not how it goes on.
        window_size: as in the settings, with `mask="sliding_window"`.
        hidden_states, hidden_time: as for `forward`. States of the first generated frame's time or later are hidden.

    Returns:
        An iterator over `GeneratedFrame`; the clips themselves have been worked through when it is returned.

    Raises:
        ConfigError: impossible steps or times; a clip without a fast frame, or with one only and no `frame_step`; a
            rule that does not make the clips' masks; hidden states of another batch size; a packed batch.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ConfigError(f"steps of a generation must be a whole number of at least 1, or None, got {steps!r}")
    config = module.config
    if mask is not None or window_size is not None:
        config = replace(config, mask=config.mask if mask is None else mask, window_size=window_size)
    clips = module.prepare(batch)
    if clips.clip is not None:
        raise ConfigError(
            "a generation continues one clip, and the sequences of this batch hold several: build the batch without "
            "pack_to"
        )
    check_states(len(clips.layouts), hidden_states, hidden_time)
    step = _frame_step(clips, frame_step)

    def rule(layout: FrameLayout) -> FrameMask:
        return limited(config, config.make_mask(layout), layout)

    made: dict[tuple[FrameLayout, FrameMask], Continuation] = {}
    for i, layout in enumerate(clips.layouts):
        given = clips.mask[i]
        if (layout, given) not in made:
            if rule(layout).patterns[0].rows != given.patterns[0].rows:
                raise ConfigError(
                    f"the mask of clip {i} is not the one that the settings make (mask {config.mask!r}), so they do "
                    "not say how it goes on: give the rule that made it, as mask=… (and window_size=…)"
                )
            made[layout, given] = beyond_clip(layout, rule, steps)
    ways = [made[layout, clips.mask[i]] for i, layout in enumerate(clips.layouts)]
    return FrameGenerator(module, clips, ways, step, steps, hidden_states, hidden_time)


def _frame_step(clips: PreparedClips, given: float | None) -> Tensor:
    """float64 `[B]` seconds between generated frames."""
    if given is not None and (
        isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given < math.inf
    ):
        raise ConfigError(f"frame_step must be a positive number of seconds, got {given!r}")
    steps = []
    for i, layout in enumerate(clips.layouts):
        fast = fast_frames(layout)
        if not fast:
            raise ConfigError(f"clip {i} has no valid fast frame to go on from: leave it out of the batch")
        if given is not None:
            steps.append(float(given))
            continue
        if len(fast) < 2:
            raise ConfigError(f"clip {i} has one fast frame only, which shows no pace: give frame_step, in seconds")
        before, last = clips.time[i, fast[-2:]].tolist()
        if not 0 < last - before < math.inf:
            raise ConfigError(
                f"the last two fast frames of clip {i} stand at {before} s and {last} s, which is no pace to go on at: "
                "give frame_step, in seconds"
            )
        steps.append(last - before)
    return torch.tensor(steps, dtype=torch.float64, device=clips.time.device)
