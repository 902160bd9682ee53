"""Where scenes begin, by FFmpeg's own detector: `select` with `gt(scene, threshold)`, on small pictures."""

from __future__ import annotations

import contextlib
from fractions import Fraction
from typing import Any

from framestream.pipeline.errors import SampleError
from framestream.pipeline.picture import fit_short_side
from framestream.pipeline.probe import VideoInfo

from .opened_video import OpenedVideo

SHORT_SIDE = 120  # pixels; what differs between scenes is seen at this size, and film grain is not


def scene_cuts(data: memoryview, info: VideoInfo, threshold: float, *, name: str = "") -> tuple[int, ...]:
    """The first frame of every scene but the first, rising.

    A scene begins where a picture differs from the one before by more than `threshold`, a share of the range of its
    values, and by so much more than that one differed from its own predecessor: a cut does, a fade or a pan does not.
    Decodes everything once, on one thread; one frame is in memory at a time.

    Args:
        data: the file.
        info: what probing said about it.
        threshold: 0 to 1; 0.3 to 0.5 is usual.
    Raises:
        SampleError: a frame is not to be had.
    """
    import av

    video = OpenedVideo(data, info, name)
    found = []
    try:
        graph: Any = None
        with contextlib.closing(video.decoder.pictures(range(info.num_frames))) as pictures:
            for index, frame, _ in pictures:
                if graph is None:
                    graph = _graph(frame, threshold)
                frame.pts, frame.time_base = index, Fraction(1)
                graph.push(frame)
                with contextlib.suppress(av.error.BlockingIOError):
                    found.append(int(graph.pull().pts))
    except (av.error.FFmpegError, ValueError) as err:
        raise SampleError(f"{name}: its scenes cannot be told apart ({err}); leave scene_threshold out") from err
    finally:
        video.close()
    return tuple(found)


def _graph(frame: Any, threshold: float) -> Any:
    import av

    short_side = min(SHORT_SIDE, frame.width, frame.height)
    width, height = (max(2, side // 2 * 2) for side in fit_short_side(frame.width, frame.height, short_side))
    graph: Any = av.filter.Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1)),
        graph.add("scale", f"{width}:{height}:flags=bilinear+accurate_rnd+bitexact"),
        graph.add("format", "yuv420p"),
        graph.add("select", f"gt(scene\\,{threshold})"),
        graph.add("buffersink"),
    ).configure()
    return graph
