"""The videos that decoding is measured on: a moving, noisy scene, made once and kept; or a folder of the user's own.

A flat pattern would flatter everybody: it has hardly any bits to decode. The scene pans over rough ground with a
camera that shakes, things cross it at several speeds, the light changes and there is film grain, so that x264 makes of
it what it makes of footage: about 1 Mbit/s at 360 lines and 5 at 1080, and two of three frames are B-frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from framestream.pipeline.atomic import atomic_file
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.shard_index import VIDEO_EXTENSIONS

FPS = 30
VERSION = 1  # of the scene and its encoding; part of the file names
_PHASES = 4  # the ground is kept at as many fractions of a pixel
_GRAIN, _SHAPES = 4, 7


@dataclass(frozen=True)
class Scene:
    """One generated clip: H.264 in mp4, 30 frames a second, sixteen to nine, B-frames as x264 sets them.

    Args:
        seconds, height: of the video.
        gop: frames from one key frame to the next, exactly.
        seed: another seed is another scene of the same kind.
    """

    seconds: int
    gop: int
    height: int
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.seconds} s, {self.height}p, GOP {self.gop}"

    @property
    def width(self) -> int:
        return round(self.height * 8 / 9) * 2

    def path(self, folder: Path) -> Path:
        """Where the clip is, or will be, in `folder`."""
        return folder / f"scene{VERSION}-{self.height}p-{self.seconds}s-gop{self.gop}-{self.seed}.mp4"


def make_scene(scene: Scene, folder: Path) -> Path:
    """The file of a clip; encoded where it is not there yet, under a temporary name until it is whole."""
    path = scene.path(folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            _encode(scene, file)
    return path


def videos_in(folder: str) -> list[Path]:
    """Every video file in a folder and the folders inside it, sorted. Raises ConfigError where there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ConfigError(f"videos is {folder}, which is no folder; name one with video files in it.")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower().lstrip(".") in VIDEO_EXTENSIONS)
    if not found:
        raise ConfigError(f"There is no video in {folder}; files ending in {', '.join(VIDEO_EXTENSIONS)} are.")
    return found


def _encode(scene: Scene, file: Any) -> None:
    import av

    if "libx264" not in av.codecs_available:
        raise ConfigError(f"PyAV {av.__version__} was built without libx264, so clips cannot be made; use --videos.")
    x264 = f"keyint={scene.gop}:min-keyint={scene.gop}:scenecut=0:open-gop=0:threads=4"
    with av.open(file, "w", format="mp4") as container:
        # Large pictures quickly, so that a minute of them is made in a bearable time; at the usual number of bits.
        preset = {"preset": "veryfast", "crf": "23"} if scene.height <= 576 else {"preset": "superfast", "crf": "25"}
        options = {**preset, "x264-params": x264}
        stream: Any = container.add_stream("libx264", rate=Fraction(FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        for planes in _pictures(scene):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))


def _pictures(scene: Scene) -> Iterator[np.ndarray]:
    """uint8 [3/2 H, W], the planes of yuv420p one below the other, for each frame."""
    random = np.random.default_rng([VERSION, scene.seed])
    width, height = scene.width, scene.height
    reach = height // 2  # how far the camera moves
    ground = [_phases(_rough(random, height + reach, width + reach, 40, 205))]
    ground += [_phases(_rough(random, (height + reach) // 2, (width + reach) // 2, 90, 165)) for _ in "uv"]
    shapes = [_Shape(random, width, height) for _ in range(_SHAPES)]
    grain = random.integers(-_GRAIN, _GRAIN + 1, (height + 64, width + 64)).astype(np.int8).view(np.uint8)
    planes = np.empty((height * 3 // 2, width), np.uint8)
    luma = planes[:height]
    chroma = planes[height:].reshape(2, height // 2, width // 2)
    turns = random.uniform(0, 2 * np.pi, 3)
    for frame in range(scene.seconds * FPS):
        time = frame / FPS
        drift = 0.5 + 0.5 * np.sin(0.23 * time + turns[0])
        shake = np.sin(np.array([5.1, 3.7]) * time + turns[1:]) * height / 400
        x, y = np.clip(np.array([drift, drift * 0.6]) * (reach - 2) + shake, 0, reach - 2)
        _cut(ground[0], x, y, luma)
        for plane, texture in zip(chroma, ground[1:], strict=True):
            _cut(texture, x / 2, y / 2, plane)
        for shape in shapes:
            shape.draw(time, luma, chroma)
        luma += np.uint8(round(6 + 6 * np.sin(0.9 * time)))  # the light; levels stay within 34 and 229
        top, left = random.integers(0, 64, 2)
        luma += grain[top : top + height, left : left + width]  # modulo 256, which is a sum of signed numbers
        yield planes


def _rough(random: np.random.Generator, height: int, width: int, low: int, high: int) -> np.ndarray:
    """uint8 [height, width] of noise at all scales, as in landscapes: half the amplitude at twice the frequency."""
    shape = (height, width // 2 + 1)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = (random.normal(size=shape) + 1j * random.normal(size=shape)) / frequency**1.4
    noise = np.fft.irfft2(spectrum, (height, width))
    noise = np.clip((noise - noise.mean()) / noise.std() / 5 + 0.5, 0, 1)
    return (low + noise * (high - low)).astype(np.uint8)


def _phases(texture: np.ndarray) -> list[np.ndarray]:
    """The texture, moved by fractions of a pixel to the left and up."""
    wide = texture.astype(np.float32)
    moved = np.roll(wide, (-1, -1), (0, 1))
    return [(wide + (moved - wide) * (k / _PHASES)).astype(np.uint8) for k in range(_PHASES)]


def _cut(phases: list[np.ndarray], x: float, y: float, out: np.ndarray) -> None:
    left, top = int(x), int(y)
    texture = phases[int((x - left) * _PHASES)]
    out[:] = texture[top : top + out.shape[0], left : left + out.shape[1]]


class _Shape:
    """A textured ellipse that crosses the picture and comes back."""

    def __init__(self, random: np.random.Generator, width: int, height: int) -> None:
        self.height, self.width = (int(side) // 2 * 2 for side in random.uniform(0.15, 0.35, 2) * height)
        self.texture = _rough(random, self.height, self.width, 40, 205)
        rows = np.linspace(-1, 1, self.height)[:, None]
        columns = np.linspace(-1, 1, self.width)[None]
        self.mask = rows**2 + columns**2 < 1
        self.colour = random.integers(80, 176, 2)
        self.room = np.array([width - self.width, height - self.height])
        self.speed, self.turn = random.uniform(0.15, 1.2, 2), random.uniform(0, 2 * np.pi, 2)

    def draw(self, time: float, luma: np.ndarray, chroma: np.ndarray) -> None:
        x, y = ((0.5 + 0.5 * np.sin(self.speed * time + self.turn)) * self.room / 2).astype(int) * 2
        np.copyto(luma[y : y + self.height, x : x + self.width], self.texture, where=self.mask)
        place = chroma[:, y // 2 : (y + self.height) // 2, x // 2 : (x + self.width) // 2]
        place[:, self.mask[::2, ::2]] = self.colour[:, None]
