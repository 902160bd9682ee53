"""From the times that packets carry to the order, the rate and the dependencies of frames. Pure, on numpy arrays.

`shown_at` is int64 [P]: when each packet's frame is shown, in ticks of the container's clock, in decoding order.
"""

from __future__ import annotations

import numpy as np

NO_TIME = -(1 << 62)
_MOST_BACK = 32  # groups of pictures that a frame may reach back; beyond, decoding starts at the first
# Codecs that show their frames in the order in which they are stored.
_IN_ORDER = ("vp8", "vp9", "av1", "mjpeg")


def is_ordered(pts: list[int], shown: np.ndarray, *, guessed: bool) -> bool:
    """Whether the container's times tell the order of the frames: none missing, none twice, none made up.

    AVI stores no times. For codecs with B-frames whose picture types its reader does not parse, FFmpeg makes
    them up from the order of decoding (`guessed`).
    """
    times = np.array(pts, dtype=np.int64)[shown]
    return bool(not guessed and (times != NO_TIME).all() and len(np.unique(times)) == len(times))


def parts_in_turn(
    shown_at: np.ndarray, decoded_at: np.ndarray, duration: np.ndarray, shown: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """`shown_at` with each part that an edit list shows directly after the part before it.

    An edit list may show several parts of a recording, in any order. FFmpeg gives the packets part by part, each from
    a key packet on, but its times of two parts may overlap by the delay of B-frames.

    Args:
        decoded_at, duration: int64 [P]; the times of decoding go back exactly where a part begins.
        shown: bool [P], packets that show a frame.
    """
    begins = keys[1:][decoded_at[keys[1:]] < decoded_at[keys[1:] - 1]].tolist()
    shown_at = shown_at.copy()
    for begin, end in zip(begins, [*begins[1:], len(shown)], strict=False):
        before, part = np.flatnonzero(shown[:begin]), begin + np.flatnonzero(shown[begin:end])
        if len(before) and len(part):
            last = before[shown_at[before].argmax()]
            shown_at[begin:end] += shown_at[last] + max(duration[last], 1) - shown_at[part].min()
    return shown_at


def leading_packets(shown_at: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """bool [P]: packets shown before the key packet that they follow. They may need the GOP before it."""
    last_key = np.searchsorted(keys, np.arange(len(shown_at)), side="right") - 1
    return (last_key >= 0) & (shown_at < shown_at[keys[np.maximum(last_key, 0)]])


def contradiction(codec: str, shown_at: np.ndarray, shown: np.ndarray, keys: np.ndarray, *, closed: bool) -> str:
    """What the times say that the codec rules out, "" where nothing: a sign of damage, or of a broken writer.

    Args:
        shown: bool [P], packets that show a frame.
        closed: after each of `keys` a decoder has forgotten all that was before.
    """
    if codec in _IN_ORDER:
        back = np.flatnonzero(np.diff(shown_at[shown]) <= 0)
        return f"the times run backwards after frame {back[0]}" if len(back) else ""
    if codec == "h264" and closed:
        if (leading_packets(shown_at, keys) & shown).any():
            return "frames are to be shown before the key frame that they follow"
        later = keys[1:][shown[keys[1:]]]
        before = np.maximum.accumulate(np.where(shown, shown_at, NO_TIME))
        late = later[before[later - 1] >= shown_at[later]]
        return f"frames before packet {late[0]}, which is a key frame, are to be shown after it" if len(late) else ""
    return ""


def start_packets(shown_at: np.ndarray, keys: np.ndarray, position: np.ndarray) -> np.ndarray:
    """int64 [T]: the last key packet at or before each frame's packet that is also shown at or before it.

    A frame that is shown before the key packet that it follows may refer to the GOP before, so its decoding
    starts one key packet earlier; the first key packet serves where there is none.
    """
    last_key = np.searchsorted(keys, position, side="right") - 1
    early = shown_at[position] < shown_at[keys[last_key]]
    for _ in range(_MOST_BACK):
        if not early.any():
            break
        last_key = np.where(early, last_key - 1, last_key)
        early = (last_key > 0) & (shown_at[position] < shown_at[keys[np.maximum(last_key, 0)]])
    return keys[np.where(early, 0, np.maximum(last_key, 0))]


def frame_rate(ticks: np.ndarray | None, tick: float, nominal: float, frames: int) -> tuple[float, np.ndarray | None]:
    """(frames per second, float64 [T] seconds from the first frame or None where the rate is constant)."""
    if ticks is None or frames < 2:
        return (nominal if 0 < nominal < 1e4 else 25.0), None
    seconds = (ticks - ticks[0]).astype(np.float64) * tick
    mean = (frames - 1) / seconds[-1]
    # Times are rounded to the container's clock, so a constant rate shows as less than one tick of deviation.
    slack = min(1.01 * tick, 0.25 / mean)
    for rate in (nominal, mean):
        if rate > 0 and np.abs(seconds - np.arange(frames) / rate).max() <= slack:
            return rate, None
    return mean, seconds
