"""One sample to one clip: plan, decode only what the plan needs, crop, gather.

The work has two halves. `ClipTransform.request` is cheap and needs no pixels: it draws the current moment, plans
the frames and reads the small members. `ClipTransform.clip` is the expensive half: it decodes and transforms.
Worker processes run both; with a GPU decoder they run the first and hand the request to the training process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .errors import ConfigError, SampleError
from .fields import check_fields, parse_field
from .file_parts import FileParts
from .health import ClipReport
from .order import below, mix
from .sampling import Sampling, SamplingPlan, make_sampling

if TYPE_CHECKING:
    from .probe import VideoInfo
    from .shards import RawSample
    from .tar_member import StoredMember

Crop = Literal["center", "random"]
FrameHook = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

CROPS = ("center", "random")

# Separate draws of one sample, so that the crop says nothing about the moment.
_POSITION, _KEY, _END, _TOP, _LEFT, _HOOK = range(11, 17)


@dataclass
class ClipRequest:
    """A clip that is planned and not yet decoded. Travels from a worker to where decoding happens.

    Attributes:
        key, shard, text, meta: of the sample.
        video: the encoded video: all of it, or only the packets that the plan needs, or not read yet, see `read`.
        info: what is known about it without decoding.
        plan: the frames to take.
        draw: 64 random bits of this sample; every random choice derives from them.
        read_ms: time spent so far.
        without_meta: the sample's JSON is missing or damaged.
        fields: further members, parsed.
        cached: whether its shard was at hand, see `RawSample`.
    """

    key: str
    shard: str
    text: str
    meta: dict[str, Any]
    video: bytes | FileParts | StoredMember
    info: VideoInfo
    plan: SamplingPlan
    draw: int
    read_ms: float
    without_meta: bool
    fields: dict[str, Any]
    cached: bool | None = None

    @property
    def name(self) -> str:
        """The sample as messages name it."""
        return f"{self.key} in {self.shard}" if self.shard else self.key

    def read(self) -> None:
        """Read what decoding will need of a video that has not been read yet. Takes as long as the storage takes.

        Raises:
            SampleError: it cannot be read.
        """
        from .indexed import needed_ranges

        if isinstance(self.video, (bytes, FileParts)):
            return
        started = perf_counter()
        ranges = needed_ranges(self.info, len(self.video), self.plan.unique.tolist())
        self.video = self.video.read() if ranges is None else self.video.read_parts(ranges)
        self.read_ms += (perf_counter() - started) * 1e3


def draw_at(seed: int, epoch: int, position: int, attempt: int = 0) -> int:
    """The 64 random bits of a position of an epoch; each spare that is tried there has its own."""
    return mix(seed, _POSITION, epoch, position, attempt)


class ClipTransform:
    """Turn a raw sample into a clip dict.

    A clip is a dict of `frames` uint8 `[F, 3, S, S]`, `frame_index` int64 `[F]`, `frame_time` float32 `[F]`
    (seconds from the first frame), `frame_stream` uint8 `[F]`, `frame_valid` bool `[F]`, `key`, `text`, `meta`,
    one entry for each of `fields`, and `report` (a `ClipReport` for statistics; not part of a batch).

    It can be used in any webdataset pipeline: `wds.WebDataset(urls).map(ClipTransform(...))`. There a sample has
    no position in an epoch, so random choices follow from its key and `seed` and are the same in every epoch.

    Args:
        sampling: which frames; an object, or a mapping as `make_sampling` takes it.
        image_size: S. The short side is resized to it, then the frame is cropped to a square.
        crop: "center", or "random" (drawn once per clip).
        decoder: a backend name, or "auto" for the best one that may run in a worker process.
        fallback: the backend that takes over what `decoder` cannot decode; None rejects such samples.
        random_end: draw the current moment, evenly from the first one at which no frame of the plan is missing
            up to the end of the clip. Clips too short for that end where they end.
        transform: `hook(frames, generator) -> frames` on uint8 `[U, 3, S, S]`, the distinct frames of the clip
            in time order (a frame that both streams want is transformed once). `generator` is a seeded
            `torch.Generator` on the CPU. Shape and dtype must stay.
        seed: seed of the random choices.
        fields: names of further members to parse, ending in "json" or "npy", e.g. `("actions.npy",)`. They
            appear under the same name. A sample without one of them is rejected.
        timeout_s: seconds after which decoding one clip is given up.
        checksums: compare a video with the SHA-256 that its shard's metadata gives, where it does, before decoding it.
            `pyav` compares the CRC-32 of every packet that it decodes where the metadata lists the packets, and then
            leaves the rest of the file unread.

    Raises:
        ConfigError: for impossible settings, at once.
    """

    def __init__(
        self,
        sampling: Sampling | Mapping[str, Any],
        *,
        image_size: int = 224,
        crop: Crop = "center",
        decoder: str = "auto",
        random_end: bool = False,
        transform: FrameHook | None = None,
        seed: int = 0,
        fields: Sequence[str] = (),
        timeout_s: float = 30.0,
        checksums: bool = True,
        fallback: str | None = None,
    ) -> None:
        from .decode import choose_backend

        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ConfigError(f"image_size is {image_size!r}; it must be a whole number of pixels, at least 1.")
        if crop not in CROPS:
            raise ConfigError(f"crop is {crop!r}; valid values are {', '.join(CROPS)}.")
        if transform is not None and not callable(transform):
            raise ConfigError(f"transform is {transform!r}; it must be callable as transform(frames, generator).")
        seconds = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
        if not seconds or not 0 < timeout_s < float("inf"):
            raise ConfigError(f"timeout_s is {timeout_s!r}; it must be a positive number of seconds.")
        self.sampling = make_sampling(sampling)
        self.image_size, self.crop = image_size, crop
        self.decoder, _ = choose_backend(decoder, "cpu" if decoder == "auto" else None)
        self.fallback = None if fallback is None else choose_backend(fallback, "cpu")[0]
        self.random_end, self.transform, self.seed = random_end, transform, seed
        self.fields, self.timeout_s, self.checksums = check_fields(fields), timeout_s, checksums

    def __call__(self, sample: RawSample | Mapping[str, Any]) -> dict[str, Any]:
        """Return the clip of a sample (ours, or a plain webdataset dict).

        Raises:
            SampleError: the sample cannot be used; the message names it and says why.
        """
        return self.clip(self.request(sample))

    def reads_packets(self, sample: RawSample) -> bool:
        """Whether some packets of the sample's video will do, each compared with its own checksum; else all of it is
        needed. Raises SampleError where it has no video."""
        from .indexed import usable_index

        video = sample.stored_video or sample.video
        return self.decoder == "pyav" and usable_index(sample.info, len(video)) is not None

    def request(self, sample: RawSample | Mapping[str, Any], *, draw: int | None = None) -> ClipRequest:
        """Plan a sample without decoding it. `draw` defaults to a hash of the sample's key and the seed. A video that
        has not been read yet is left so where its packets will do.

        Raises:
            SampleError: the sample has no usable video, or lacks one of the fields.
        """
        from .probe import probe_video
        from .shards import RawSample

        started = perf_counter()
        if not isinstance(sample, RawSample):
            sample = RawSample.from_webdataset(dict(sample))
        if draw is None:
            digest = blake2b(sample.key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            draw = mix(self.seed, _KEY, int.from_bytes(digest, "little"))
        packets = self.reads_packets(sample)
        video = (sample.stored_video if packets else None) or sample.video
        name = f"{sample.key} in {sample.shard}"
        info = sample.info
        if info is None:
            info = probe_video(sample.video, name=name)
        elif self.checksums and not packets:
            _check_sha256(sample.video, sample.meta.get("sha256"), name)
        if info.num_frames > len(video):  # planning costs memory by frame, so it must not believe just anything
            raise SampleError(
                f"{name}: its metadata says {info.num_frames} frames, more than the video "
                f"has bytes ({len(video)}); it is cut, or described by somebody else's metadata."
            )
        return ClipRequest(
            key=sample.key,
            shard=sample.shard,
            text=sample.text,
            meta={name: value for name, value in sample.meta.items() if name != "packets"},
            video=video,
            info=info,
            plan=self._plan(info, draw),
            draw=draw,
            without_meta=bool(sample.meta_error),
            fields={name: parse_field(sample, name) for name in self.fields},
            cached=sample.cached,
            read_ms=(perf_counter() - started) * 1e3,
        )

    def clip(self, request: ClipRequest) -> dict[str, Any]:
        """Decode and transform a request.

        Raises:
            SampleError: the video cannot be decoded to exactly the frames of the plan.
            ConfigError: the `transform` hook changed shape or dtype.
        """
        from .decode import open_decoder

        request.read()
        assert isinstance(request.video, (bytes, FileParts))
        plan, size = request.plan, self.image_size
        started = perf_counter()
        with open_decoder(
            request.video,
            backend=self.decoder,
            short_side=size,
            info=request.info,
            name=request.name,
            timeout_s=self.timeout_s,
            fallback=self.fallback,
        ) as decoder:
            frames = decoder.frames_at(plan.unique.tolist())  # [U, 3, H, W]
            times = np.asarray(decoder.timestamps)
            fallback: str = getattr(decoder, "fallback", "")
        decoded = perf_counter()
        frames = self._crop(frames, request)  # [U, 3, S, S]
        if self.transform is not None:
            frames = self._hooked(frames, request.draw)
        frames = _gathered(frames, plan.gather)  # [F, 3, S, S]
        timing = {
            "read_ms": request.read_ms,
            "decode_ms": (decoded - started) * 1e3,
            "transform_ms": (perf_counter() - decoded) * 1e3,
        }
        return {
            "frames": frames,
            "frame_index": torch.from_numpy(plan.frame_index),
            "frame_time": torch.from_numpy(times[plan.frame_index].astype(np.float32)),
            "frame_stream": torch.from_numpy(plan.stream),
            "frame_valid": torch.from_numpy(plan.valid),
            "key": request.key,
            "text": request.text,
            "meta": request.meta,
            **request.fields,
            "report": ClipReport(timing, request.without_meta, request.cached, fallback=fallback),
        }

    def _plan(self, info: VideoInfo, draw: int) -> SamplingPlan:
        facts: dict[str, Any] = {"timestamps": info.times() if self.sampling.fps is not None else None}
        if getattr(self.sampling, "slow_snap", None) is not None:  # a sampling of somebody's own need not know them
            facts["key_frames"] = info.key_frames
        if self.random_end:
            first = _first_full_end(self.sampling, info.num_frames, facts)
            facts["end"] = first + below(mix(draw, _END), info.num_frames - first + 1)
        return self.sampling.plan(info.num_frames, **facts)

    def _crop(self, frames: torch.Tensor, request: ClipRequest) -> torch.Tensor:
        size = self.image_size
        height, width = frames.shape[-2:]
        if min(height, width) != size:
            raise SampleError(
                f"{request.name}: the {self.decoder} decoder returned {width}x{height} frames where a short side "
                f"of {size} was asked for; use another decoder."
            )
        top, left = (height - size) // 2, (width - size) // 2
        if self.crop == "random":
            top = below(mix(request.draw, _TOP), height - size + 1)
            left = below(mix(request.draw, _LEFT), width - size + 1)
        return frames[..., top : top + size, left : left + size]

    def _hooked(self, frames: torch.Tensor, draw: int) -> torch.Tensor:
        assert self.transform is not None
        generator = torch.Generator().manual_seed(mix(draw, _HOOK) >> 1)
        result = self.transform(frames, generator)
        if not isinstance(result, torch.Tensor) or (result.shape, result.dtype) != (frames.shape, frames.dtype):
            got = f"{result.dtype} {list(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise ConfigError(
                f"transform returned {got}; it must return {frames.dtype} {list(frames.shape)}, what it was given."
            )
        return result


def _gathered(frames: torch.Tensor, gather: np.ndarray) -> torch.Tensor:
    """`frames[gather]`, contiguous. Through NumPy where it can be: PyTorch indexes bytes one by one, and with several
    threads, which wait for one another where cores are few."""
    if frames.device.type == "cpu":
        return torch.from_numpy(np.ascontiguousarray(frames.numpy()[gather]))
    return frames.index_select(0, torch.from_numpy(gather).to(frames.device))


def _check_sha256(video: bytes, expected: Any, name: str) -> None:
    """Raise SampleError where the video is not the one that the metadata was written for. Damage can leave a stream
    decodable, and then nothing else tells."""
    if isinstance(expected, str) and (found := sha256(video).hexdigest()) != expected:
        raise SampleError(
            f"{name}: its video has the sha256 {found[:12]}… and its metadata says {expected[:12]}…; the video was "
            "damaged or replaced after the shard was written. Write the shard again, or use checksums=False."
        )


def _first_full_end(sampling: Sampling, num_frames: int, facts: Mapping[str, Any]) -> int:
    """The earliest moment at which the plan lacks no frame; the clip's end where there is none.

    A longer past never takes frames away, so bisection finds it.
    """
    low, high = 1, num_frames
    while low < high:
        middle = (low + high) // 2
        if sampling.plan(num_frames, end=middle, **facts).valid.all():
            high = middle
        else:
            low = middle + 1
    return low
