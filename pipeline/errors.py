"""What can go wrong, by what the reader of the message has to do about it.

Every error takes one finished sentence, so that it survives pickling on its way out of a worker process.
"""

from __future__ import annotations


class FramestreamError(Exception):
    """Base of all errors that framestream raises on purpose."""


class ConfigError(FramestreamError, ValueError):
    """A setting is impossible or unknown. Raised before any work begins."""


class ShardError(FramestreamError):
    """A shard or its index is missing, damaged, or does not match."""


class StorageError(ShardError):
    """The storage does not answer or refuses. Nothing is wrong with what was asked for; later it may be had."""


class SampleError(FramestreamError):
    """One sample cannot be used. Loaders record it, replace it and go on."""


class DecodeError(SampleError):
    """A video cannot be decoded to exactly the frames that were asked for."""


class StateError(FramestreamError):
    """A saved state does not belong to this data, these settings or this version; or a loop over a loader was ended by
    another one."""


class RejectLimitError(FramestreamError):
    """More samples were rejected than the run allows."""


class WorkerError(FramestreamError):
    """Worker processes keep dying, and no sample is to blame."""


class LeakError(FramestreamError):
    """A prediction target is visible to the query that has to predict it."""
