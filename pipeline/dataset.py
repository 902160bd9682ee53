"""Samples by position, with spares for those that cannot be used; and the map-style dataset on top of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from torch.utils.data import Dataset

from .cache import DEFAULT_CACHE_BYTES
from .clip_order import ClipOrder
from .deaths import Banned
from .errors import ConfigError, SampleError
from .health import ClipReport, NoSpareError, Reject
from .order import SampleOrder
from .sampling import Sampling
from .shard_paths import ShardsArgument
from .shards import ShardSet
from .transforms import ClipRequest, ClipTransform, Crop, FrameHook, draw_at
from .watch import Place, Watch

#: Samples tried for one position before the data as a whole is held to be unusable.
MAX_ATTEMPTS = 32


@dataclass
class PlannedClip:
    """A clip on its way: where it stands, what to decode, and what was rejected in its place so far."""

    epoch: int
    position: int
    place: Place
    request: ClipRequest
    rejects: list[Reject] = field(default_factory=list)


class ClipSource:
    """Clips by (epoch, position). A sample that fails is replaced by spares until one can be used.

    Which spare follows from (seed, epoch, position, attempt) alone, so that every run, rank and worker count
    replaces alike. `meta["spare_for"]` of a spare holds the key of the sample that it replaces and
    `meta["rejects"]` lists what failed: shard, key and reason.

    Args:
        shards: one set per dataset.
        order: of all of them.
        transform: sample to clip.
        names: of the datasets of a mixture, which `meta["dataset"]` then tells; empty where there is one.
        spares: False raises the SampleError of a sample that cannot be used instead of replacing it.
    """

    def __init__(
        self,
        shards: Sequence[ShardSet],
        order: ClipOrder,
        transform: ClipTransform,
        names: Sequence[str] = (),
        *,
        spares: bool = True,
    ) -> None:
        self.shards, self.order, self.transform, self.names = tuple(shards), order, transform, tuple(names)
        self.spares = spares
        self.watch: Watch | None = None  # of the worker process that this is in
        self.limit_s = 3 * transform.timeout_s  # opening, reading frames, and as much again to be sure
        self._want = frozenset({"video", "json", "txt", *transform.fields})
        self._banned: dict[Place, str] = {}

    def ban(self, banned: Banned) -> None:
        """Reject a sample unread from now on."""
        self._banned[banned.place] = banned.reason

    def plan(self, epoch: int, position: int) -> PlannedClip:
        """Read a sample and plan its frames, without decoding.

        Raises:
            NoSpareError: neither the sample nor any spare tried in its place can be used.
            SampleError: the sample cannot be used, and there are to be no spares.
            ShardError: a shard cannot be read.
        """
        rejects: list[Reject] = []
        planned = PlannedClip(epoch, position, *self._request(epoch, position, rejects), rejects)
        self._at_rest()
        return planned

    def finish(self, planned: PlannedClip) -> dict[str, Any]:
        """Decode a planned clip; raises as `plan`."""
        while True:
            try:
                clip = self.transform.clip(planned.request)
            except SampleError as err:
                if not self.spares:
                    raise
                planned.rejects.append(self._rejected(planned.place, str(err)))
                planned.place, planned.request = self._request(planned.epoch, planned.position, planned.rejects)
                continue
            self._at_rest()
            report: ClipReport = clip["report"]
            if self.names:
                clip["meta"]["dataset"] = report.dataset = self.names[planned.place.part]
            if planned.rejects:
                clip["meta"]["spare_for"] = planned.rejects[0]["key"]
                clip["meta"]["rejects"] = report.rejects = planned.rejects
            return clip

    def clip(self, epoch: int, position: int) -> dict[str, Any]:
        """Return the clip at a position; raises as `plan`."""
        rejects: list[Reject] = []
        return self.finish(PlannedClip(epoch, position, *self._request(epoch, position, rejects), rejects))

    def _request(self, epoch: int, position: int, rejects: list[Reject]) -> tuple[Place, ClipRequest]:
        """The first of the sample and its spares that can be planned. Stays watched over until it is decoded."""
        while len(rejects) < MAX_ATTEMPTS:
            attempt = len(rejects)
            place = self.order.spare(epoch, position, attempt - 1) if attempt else self.order.at(epoch, position)
            shards = self.shards[place.part]
            if place in self._banned:
                rejects.append(self._rejected(place, self._banned[place]))
                continue
            if self.watch is not None:
                self.watch.begin(place)
            started = perf_counter()
            try:
                raw = shards.read(place.shard, place.sample, want=self._want, defer_video=True)
                if not self.transform.reads_packets(raw):
                    raw = raw.read()
                read = perf_counter()
                if self.watch is not None:
                    self.watch.limit(self.limit_s)
                draw = draw_at(self.order.seed, epoch, position, attempt)
                request = self.transform.request(raw, draw=draw)
                if self.watch is not None:  # the storage may take its time
                    self.watch.begin(place)
                request.read()
                if self.watch is not None:
                    self.watch.limit(self.limit_s)
            except SampleError as err:
                if not self.spares:
                    raise
                rejects.append(self._rejected(place, str(err)))
                continue
            request.read_ms += (read - started) * 1e3
            return place, request
        self._at_rest()
        reasons = " | ".join(dict.fromkeys(reject["reason"] for reject in rejects[-3:]))
        raise NoSpareError(
            f"{len(rejects)} samples in a row could not be used (position {position} of epoch {epoch}); look at "
            f"the data with `framestream verify`. The last reasons: {reasons}",
            rejects,
        )

    def _rejected(self, place: Place, reason: str) -> Reject:
        shards = self.shards[place.part]
        key = shards.keys(place.shard)[place.sample]
        return {"shard": shards.paths[place.shard], "key": key, "reason": reason}

    def _at_rest(self) -> None:
        if self.watch is not None:
            self.watch.end()


class ClipDataset(Dataset[dict[str, Any]]):
    """The clips of a set of shards by index, in stored order, for any DataLoader.

    `dataset[i]` is a clip dict as `ClipTransform` describes it, and negative indices count from the end. Shuffling
    is the sampler's business. Use `ClipCollator` as `collate_fn`:

        DataLoader(ClipDataset("shards/train", sampling=...), batch_size=8, shuffle=True, num_workers=4,
                   collate_fn=ClipCollator(patches_per_frame=256))

    A sample that cannot be used is replaced by a spare, marked in `meta` (`spare_for`, `rejects`), so that training
    goes on. Where index i has to be clip i and no other, `on_bad="raise"` raises the SampleError instead.

    Args:
        shards: folder, tar, list, glob, brace pattern, URL, or a `ShardSet`.
        on_bad: what a sample that cannot be used becomes: a "spare", or an error ("raise").
        sampling, image_size, crop, decoder, random_end, transform, fields, timeout_s, checksums: as in `ClipTransform`.
        seed: seed of the random choices and spares.
        storage_options: for remote shards, handed to fsspec.
        cache_dir, cache_bytes: where remote shards and their indexes are kept, and how many bytes of shards.

    Raises:
        ConfigError: for impossible settings, at once.
        ShardError: there are no shards, or one cannot be indexed.
    """

    def __init__(
        self,
        shards: ShardSet | ShardsArgument,
        *,
        on_bad: Literal["spare", "raise"] = "spare",
        sampling: Sampling | Mapping[str, Any],
        image_size: int = 224,
        crop: Crop = "center",
        decoder: str = "auto",
        random_end: bool = False,
        transform: FrameHook | None = None,
        fields: Sequence[str] = (),
        seed: int = 0,
        storage_options: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        timeout_s: float = 30.0,
        checksums: bool = True,
    ) -> None:
        if on_bad not in ("spare", "raise"):
            raise ConfigError(f"on_bad is {on_bad!r}; valid values are spare, raise.")
        clip_transform = ClipTransform(
            sampling,
            image_size=image_size,
            crop=crop,
            decoder=decoder,
            random_end=random_end,
            transform=transform,
            seed=seed,
            fields=fields,
            timeout_s=timeout_s,
            checksums=checksums,
        )
        opened = ShardSet.open(shards, storage_options=storage_options, cache_dir=cache_dir, cache_bytes=cache_bytes)
        order = ClipOrder([SampleOrder(opened.sizes, seed=seed, shuffle=False)], seed)
        self.source = ClipSource([opened], order, clip_transform, spares=on_bad == "spare")
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.source.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"Clip {position} is outside a dataset of {len(self)} clips.")
        return self.source.clip(self.epoch, position % len(self))

    def set_epoch(self, epoch: int) -> None:
        """Draw other random moments and crops from now on. Persistent workers keep the epoch they started with."""
        self.epoch = epoch
