"""Reading shards: which samples there are, and the bytes of one of them.

    shards = ShardSet.open("/data/shards")            # or a list, a glob, {000..012}, s3://…
    sample = shards.read(*shards.locate(17))
    sample.video, sample.meta, sample.text

A set holds names and counts, not the indexes of all its samples: those are read shard by shard, on first use, in
the process that uses them. Nothing in a shard is ever executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from .cache import DEFAULT_CACHE_BYTES, ShardCache, default_cache_dir
from .errors import ShardError
from .lease import Lease
from .raw_sample import RawSample, sample_from_members
from .shard_index import (
    SAFE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    ShardIndex,
    video_member,
)
from .shard_listing import ListedShard, Listing
from .shard_paths import ShardsArgument, is_url, resolve
from .shard_writer import ShardWriter
from .tar_member import OpenFile, StoredMember

__all__ = ["SAFE_EXTENSIONS", "VIDEO_EXTENSIONS", "RawSample", "ShardSet", "ShardWriter", "sample_from_members"]

MAX_HANDLES = 32  # open local shards per process
MAX_INDEXED_SAMPLES = 50_000  # samples whose places are kept in memory per process

log = logging.getLogger(__name__)


class _Handle:
    """An open file that is closed when nobody refers to it any more, so that threads may share it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _Process:
    """What one process has opened."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.handles: OrderedDict[int, _Handle] = OrderedDict()
        self.indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self.indexed = 0  # samples in them


class ShardSet:
    """The samples of a row of shards, readable one by one. Made by `ShardSet.open`.

    Attributes:
        names: name of each shard below the folder that all of them share.
        paths: path or URL of each shard.
        sizes: number of usable samples of each shard.
        num_samples: their sum.
        problems: one sentence per thing that was wrong with the shards and is worked round.
        lost: the shards that were cut and hold fewer samples than their index lists; each has `path`, `num_samples`,
            `expected`, `lost` and `why`.
        fingerprint: hex digest of names, bytes, sample counts and checksums; the folder's place does not enter.
    """

    def __init__(self, shards: tuple[ListedShard, ...], cache: ShardCache, problems: tuple[str, ...]) -> None:
        self._shards = shards
        self._cache = cache
        self.problems = problems
        self.lost = tuple(shard for shard in shards if shard.lost)
        self.paths = tuple(shard.path for shard in shards)
        self.names = _relative_names(self.paths)
        self.sizes = tuple(shard.num_samples for shard in shards)
        self._ends = tuple(accumulate(self.sizes))
        self.num_samples = self._ends[-1]
        facts = [[n, s.num_bytes, s.num_samples, s.sha256] for n, s in zip(self.names, shards, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        self._process = _Process()

    @classmethod
    def open(
        cls,
        shards: ShardsArgument | ShardSet,
        *,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        attempts: int = 4,
        backoff_s: float = 0.5,
        stall_s: float = 60.0,
    ) -> ShardSet:
        """Find the shards and count their samples; tars without an index are indexed now, once.

        Args:
            shards: a tar, a folder (its own tars, sorted), a list, a glob, a `{000..012}` pattern, an fsspec URL, or
                a set that is open already.
            storage_options: passed to the fsspec file system of URLs.
            cache_dir: where remote shards and indexes of read-only folders are kept; default
                `$FRAMESTREAM_CACHE`, else `~/.cache/framestream`.
            cache_bytes: limit for remote shards kept there.
            attempts, backoff_s: how often anything remote is tried, and seconds waited after the first failure,
                doubled after each further one.
            stall_s: seconds without a byte after which a connection to http(s) or s3 counts as dead.

        Raises:
            ConfigError: an impossible `shards` argument or setting, a shell opener, an unknown protocol.
            ShardError: nothing there, or no usable sample in all of it.
        """
        if isinstance(shards, ShardSet):
            return shards
        folder = (Path(cache_dir) if cache_dir is not None else default_cache_dir()).expanduser().absolute()
        cache = ShardCache(folder, cache_bytes, dict(storage_options or {}), attempts, backoff_s, stall_s)
        found, problems = Listing(cache).shards(resolve(shards, cache.remote))
        if not any(shard.num_samples for shard in found):
            raise ShardError("the shards hold no usable sample: " + "; ".join(problems or ["they are empty"]))
        for problem in problems[:20]:
            log.warning("%s", problem)
        if len(problems) > 20:
            log.warning("and %d more problems", len(problems) - 20)
        return cls(tuple(found), cache, tuple(problems))

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"ShardSet({len(self.names)} shards, {self.num_samples} samples, {len(self.problems)} problems)"

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_process"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._process = _Process()

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, sample) of a sample's place in stored order. Raises IndexError outside of 0..num_samples-1."""
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.sizes[shard])

    def keys(self, shard: int) -> tuple[str, ...]:
        """Keys of one shard's samples in stored order."""
        return tuple(sample.key for sample in self._index(shard).samples)

    def read(
        self, shard: int, sample: int, *, want: Collection[str] | None = None, defer_video: bool = False
    ) -> RawSample:
        """The bytes of one sample, read by offset.

        Args:
            shard: number of the shard.
            sample: number of the sample in it.
            want: extensions to read, `"video"` standing for the sample's video; default all but npy.
            defer_video: leave the video of a local shard unread until `RawSample.video` or `stored_video` is asked for.

        Raises:
            ShardError: the shard cannot be opened or is another one than was indexed.
            SampleError: the shard ends early or holds something else at this place.
        """
        lease = self._lease(shard)
        file: OpenFile = self._local(shard) if lease is None else lease
        try:
            return self._read(shard, sample, want, file, lease, defer_video)
        finally:
            if lease is not None:
                lease.close()

    def lease(self, shard: int, *, over_limit: bool = True) -> Lease | None:
        """Fetch a remote shard and its index ahead of need, and keep it from eviction until the lease is closed.

        None for a local shard and, without `over_limit`, for one that does not fit into the cache beside those in
        use. Raises ShardError where it cannot be fetched.
        """
        lease = self._lease(shard, over_limit=over_limit)
        if lease is not None:
            try:
                entry = self._shards[shard]
                Listing(self._cache).index(entry.path, entry.num_bytes, entry.sha256)
            except BaseException:
                lease.close()
                raise
        return lease

    @property
    def remote_bytes(self) -> tuple[int, ...]:
        """Bytes of the remote shards, those of unknown size counting as none; () where all are local."""
        return tuple(shard.num_bytes or 0 for shard in self._shards if is_url(shard.path))

    @property
    def cache_bytes(self) -> int:
        """Limit of the cache for remote shards."""
        return self._cache.limit_bytes

    def _read(
        self,
        shard: int,
        sample: int,
        want: Collection[str] | None,
        file: OpenFile,
        lease: Lease | None,
        defer_video: bool,
    ) -> RawSample:
        path = self.paths[shard]
        entry = self._index(shard).samples[sample]
        wanted = set(entry.members) - {"npy"} if want is None else set(want)
        if "video" in wanted and (video := video_member(entry.members)) is not None:
            wanted.add(video)
        members: dict[str, bytes | StoredMember] = {}
        for ext, (offset, size) in entry.members.items():
            if ext in wanted:
                member = StoredMember(file, path, entry.key, ext, offset, size)
                # The file of a lease is closed before the sample is used.
                later = defer_video and lease is None and ext in VIDEO_EXTENSIONS
                members[ext] = member if later else member.read()
        return RawSample(entry.key, path, members, None if lease is None else lease.hit)

    def _lease(self, shard: int, *, over_limit: bool = True) -> Lease | None:
        """A lease on a remote shard for as long as it is read.

        Handles of remote shards are not kept: each of them would keep its shard from eviction for as long as the
        process lives. Which ones stay is the business of `ShardPrefetch`, which knows the order.
        """
        entry = self._shards[shard]
        if not is_url(entry.path):
            return None
        fetch = self._cache.open if over_limit else self._cache.open_within_limit
        return fetch(entry.path, num_bytes=entry.num_bytes, sha256=entry.sha256)

    def _mine(self) -> _Process:
        if self._process.pid != os.getpid():  # after a fork: offsets, locks and handles of the parent stay its own
            self._process = _Process()
        return self._process

    def _local(self, shard: int) -> _Handle:
        mine = self._mine()
        with mine.lock:
            handle = mine.handles.get(shard)
        if handle is None:  # opened without the lock: a slow disk must not keep other threads from other shards
            handle = _Handle(_open_local(self.paths[shard]))
        with mine.lock:
            handle = mine.handles.setdefault(shard, handle)
            mine.handles.move_to_end(shard)
            while len(mine.handles) > MAX_HANDLES:
                mine.handles.popitem(last=False)
            return handle

    def _index(self, shard: int) -> ShardIndex:
        mine, entry = self._mine(), self._shards[shard]
        with mine.lock:
            index = mine.indexes.get(shard)
        if index is None:
            index = Listing(self._cache).index(entry.path, entry.num_bytes, entry.sha256)
            if len(index.samples) != entry.num_samples:
                raise ShardError(
                    f"shard {entry.path} has {len(index.samples)} samples, {entry.num_samples} were counted when "
                    f"it was opened: open the set again, or run `framestream verify` on its folder"
                )
        with mine.lock:
            if shard not in mine.indexes:
                mine.indexes[shard] = index
                mine.indexed += len(index.samples)
            mine.indexes.move_to_end(shard)
            while len(mine.indexes) > 1 and mine.indexed > MAX_INDEXED_SAMPLES:
                _, dropped = mine.indexes.popitem(last=False)
                mine.indexed -= len(dropped.samples)
            return mine.indexes[shard]


def _open_local(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        raise ShardError(f"shard {path} cannot be opened ({err.strerror})") from err


def _relative_names(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Names below the deepest folder that all paths share."""
    split = [path.split("/") for path in paths]
    depth = 0
    while all(len(parts) > depth + 1 for parts in split) and len({parts[depth] for parts in split}) == 1:
        depth += 1
    return tuple("/".join(parts[depth:]) for parts in split)
