"""What the tests of making clips share: open sources, clips that are looked at, and sound whose time can be heard."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from framestream.pipeline.decode import open_decoder
from framestream.pipeline.probe import VideoInfo, probe_video
from framestream.tools.encode import encode
from framestream.tools.opened_video import OpenedVideo
from framestream.tools.shard_options import Encoding

from remux import Track, remux
from synthetic import make_video, read_indices

SOUND_RATE = 48_000


@contextmanager
def opened(path: Path) -> Iterator[OpenedVideo]:
    data = path.read_bytes()
    video = OpenedVideo(memoryview(data), probe_video(data), path.name)
    try:
        yield video
    finally:
        video.close()


def clip(path: Path, frames: tuple[int, int], encoding: Encoding | None = None, *, sound: bool = False) -> bytes:
    with opened(path) as video:
        return encode(video, frames, encoding or Encoding(gop=8), path.name, sound=sound)


def shown(data: bytes) -> tuple[VideoInfo, list[int]]:
    """What a clip is, and the indices that its frames carry."""
    info = probe_video(data, packets=True)
    with open_decoder(data, backend="pyav", info=info) as decoder:
        return info, read_indices(decoder.frames_at(range(info.num_frames)))


def beeping(path: Path, codec: str, seconds: int = 6) -> Path:
    """Pictures with a sound that begins anew, loud, at each second, and is silent in the second half of it."""
    pictures = make_video(path.with_name("pictures.mp4"), num_frames=24 * seconds, gop=24)
    sound = path.with_name("sound.mkv")
    with av.open(str(sound), "w") as container:
        stream: Any = container.add_stream(codec, rate=SOUND_RATE, layout="mono")
        time = np.arange(SOUND_RATE * seconds)
        wave = np.where(time % SOUND_RATE < SOUND_RATE // 2, np.sin(time / 7) * 20000, 0).astype(np.int16)
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=SOUND_RATE)
        for start in range(0, len(wave), 960):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 960], format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, start, Fraction(1, SOUND_RATE)
            for resampled in resampler.resample(frame):
                container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    return remux(path, Track(pictures), Track(sound, "audio"))


def onsets(data: bytes) -> tuple[str, list[float]]:
    """The codec of the sound, and when it becomes loud, in seconds from the first picture."""
    with av.open(io.BytesIO(data)) as container:
        pictures: Any = container.streams.video[0]
        begin = min(p.pts for p in container.demux(pictures) if p.pts is not None) * pictures.time_base
        container.seek(0)
        loud: list[tuple[float, bool]] = []
        for frame in container.decode(audio=0):
            samples = np.abs(frame.to_ndarray().astype(np.float64).reshape(-1))
            scale = 1.0 if "flt" in frame.format.name else 32768.0 if "s16" in frame.format.name else 2.0**31
            at = float(frame.pts * frame.time_base - begin)
            for k in range(0, len(samples) - 47, 48):
                loud.append((at + k / frame.sample_rate, samples[k : k + 48].max() > 0.25 * scale))
        name = container.streams.audio[0].codec_context.name
    return name, [b[0] for a, b in zip([(0.0, False), *loud], loud, strict=False) if b[1] and not a[1]]
