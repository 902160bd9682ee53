"""How each encoder is set up: one thread, no B-frames, closed groups of pictures of fixed length, no trace of the run.

The same frames have to give the same bytes on every run. What stood in the way of that is switched off here, and said.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from framestream.pipeline.errors import ConfigError

from .shard_options import Codec, Encoding


class Encoder(NamedTuple):
    """FFmpeg's name of an encoder, and its options for a gop and a crf."""

    name: str
    options: Callable[[int, int], dict[str, str]]


def _x264(gop: int, crf: int) -> dict[str, str]:
    # Without mbtree: with it this libx264 gave other bytes in 1 of 12 runs of the same process, even on one thread.
    params = f"threads=1:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=0:mbtree=0"
    return {"preset": "fast", "crf": str(crf), "x264-params": params}


def _x265(gop: int, crf: int) -> dict[str, str]:
    # One thread is no thread pool and no frame threads; the header would name the build and all settings. Without
    # weighted prediction: with it small pictures came out otherwise whenever memory held something else before.
    params = (
        f"weightp=0:pools=none:frame-threads=1:wpp=0:keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes=0:info=0:"
        "repeat-headers=0:log-level=none"
    )
    return {"preset": "fast", "crf": str(crf), "x265-params": params}


def _vp9(gop: int, crf: int) -> dict[str, str]:
    # No frames ahead and no alternate references, which would be frames that nobody sees.
    return {
        "crf": str(crf),
        "b": "0",
        "g": str(gop),
        "keyint_min": str(gop),
        "lag-in-frames": "0",
        "auto-alt-ref": "0",
        "deadline": "good",
        "cpu-used": "4",
        "row-mt": "0",
    }


def _svtav1(gop: int, crf: int) -> dict[str, str]:
    # Prediction from the past alone (pred-struct 1), key frames where they are due and nowhere else.
    params = f"lp=1:pred-struct=1:scd=0:irefresh-type=2:lookahead=0:keyint={gop}"
    return {"preset": "8", "crf": str(crf), "g": str(gop), "svtav1-params": params}


ENCODERS: dict[Codec, Encoder] = {
    "h264": Encoder("libx264", _x264),
    "hevc": Encoder("libx265", _x265),
    "vp9": Encoder("libvpx-vp9", _vp9),
    "av1": Encoder("libsvtav1", _svtav1),
}
TAGS = {"hevc": "hvc1"}  # by which mp4 names the codec, where players do not take FFmpeg's own choice


def options_of(encoding: Encoding) -> dict[str, str]:
    """FFmpeg's options for an encoder."""
    os.environ.setdefault("SVT_LOG", "1")  # errors alone; it describes itself at length otherwise
    options = ENCODERS[encoding.codec].options(encoding.gop, encoding.crf)
    return {**options, "flags": "+bitexact"}


def version_of(codec: Codec) -> str:
    """What the bytes of encoded clips depend on. Raises ConfigError when this PyAV cannot encode that codec."""
    import av

    name = ENCODERS[codec].name
    if name not in av.codecs_available:
        raise ConfigError(
            f"PyAV {av.__version__} was built without {name}, so clips cannot be encoded as {codec}: use its wheel"
        )
    libraries = ", ".join(
        f"{library} {'.'.join(map(str, av.library_versions[library]))}"
        for library in ("libavcodec", "libavfilter", "libavformat", "libswscale")
    )
    return f"PyAV {av.__version__}, {libraries}, {name}"
