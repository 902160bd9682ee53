"""Talking to remote storage: which file system, how long to wait for it, what is tried again.

Everything that framestream asks of a remote file system goes through `Remote.call`, so there is one place that
retries, and one sentence for what failed. Time limits count from the last byte that arrived, never for a whole
file, because a large shard may take as long as it needs while a server that has stopped sending may not.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import ConfigError, FramestreamError, ShardError, StorageError
from .protocols import refuse, unopenable
from .redaction import shown_url, without_secrets

CONNECT_S = 30.0  # a connection that takes longer is tried again
MAX_WAIT_S = 60.0  # between two attempts

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = (PermissionError, IsADirectoryError, NotADirectoryError)
_DENIED_NAMES = {"NoCredentialsError", "PartialCredentialsError", "InvalidURL"}  # of botocore and aiohttp
# What is the matter with one file or its address, so that the storage and all other files may be well.
_FILE_FAULTS = (IsADirectoryError, NotADirectoryError, ValueError, NotImplementedError, zipfile.BadZipFile,
                tarfile.TarError, zlib.error)  # fmt: skip
_FILE_FAULT_NAMES = {"ParamValidationError"}  # of botocore: a bucket that cannot be called so
_OF_THIS_MACHINE = ("file://", "local://", "memory://")
_FINAL = {401, 403, 404, 405, 406, 410, 414, 416, 451}  # HTTP answers that another attempt does not change

_random = random.SystemRandom()  # other in each fork, and the global random state is the user's
log = logging.getLogger(__name__)
T = TypeVar("T")
P = TypeVar("P")


class GiveUpError(Exception):
    """Raised by an action of `Remote.call` for its caller: trying again is no use."""


def disk_full(err: BaseException) -> bool:
    """Whether a local disk, quota or file size limit is exhausted."""
    return isinstance(err, OSError) and err.errno in _FULL


@dataclass(frozen=True)
class Remote:
    """Settings for remote storage: cheap to pickle, safe under fork and spawn.

    Attributes:
        storage_options: passed to the fsspec file system.
        attempts: how often anything is tried.
        backoff_s: seconds waited after the first failure, doubled after each further one, plus up to as much again.
        stall_s: seconds without a byte after which a connection counts as dead, for http(s) and s3; storage options
            that set `client_kwargs` (http) or `config_kwargs` (s3) themselves keep their own limits.
    """

    storage_options: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 4
    backoff_s: float = 0.5
    stall_s: float = 60.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff_s < 0 or self.stall_s <= 0:
            raise ConfigError(
                f"remote shards need at least 1 attempt, no negative back-off and a time limit above 0, got "
                f"attempts={self.attempts}, backoff_s={self.backoff_s}, stall_s={self.stall_s}"
            )

    def filesystem(self, url: str) -> tuple[Any, str]:
        """The fsspec file system of `url` and the path in it. Some kinds connect for this.

        Raises:
            ConfigError: it is unknown, not installed, or does not take these options.
            FileNotFoundError, ShardError: as `call` does.
        """
        import fsspec

        refuse(url)
        options = dict(self.storage_options)
        protocol = url.partition("://")[0]
        is_s3 = protocol in ("s3", "s3a")
        own_retries = is_s3 and "config_kwargs" not in options

        def make() -> tuple[Any, str]:
            try:
                if protocol in ("http", "https") and "client_kwargs" not in options:
                    options["client_kwargs"] = _http_limits(self.stall_s)
                if own_retries:
                    options["config_kwargs"] = {
                        "connect_timeout": min(CONNECT_S, self.stall_s),
                        "read_timeout": self.stall_s,
                        "retries": {"total_max_attempts": 1},
                    }
                return fsspec.core.url_to_fs(url, **options)
            except (ValueError, ImportError, TypeError) as err:
                raise unopenable(url, err) from err

        fs, path = self.call(url, make)
        if own_retries:
            fs.retries = 1  # retries inside of retries multiply: a stalled server would hold us for an hour
        return fs, path

    def call(self, url: str, action: Callable[[], T], doing: str = "fetched") -> T:
        """Run `action`, again where that may help; `doing` is what it does with `url`, for messages.

        Raises:
            FileNotFoundError: what `url` names does not exist.
            StorageError: it refuses, or failed `attempts` times.
            ShardError: this one file cannot be had, whatever the state of the storage.
            OSError: the local disk is full (`disk_full`).
        """
        from tenacity import Retrying, retry_if_exception, stop_after_attempt

        name = shown_url(url)
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=lambda state: (
                min(self.backoff_s * 2 ** (state.attempt_number - 1), MAX_WAIT_S) + _random.uniform(0, self.backoff_s)
            ),
            retry=retry_if_exception(_may_change),
            before_sleep=lambda state: log.warning(
                "%s could not be %s (%s), trying again",
                name,
                doing,
                _told(state.outcome.exception() if state.outcome else None, url),
            ),
            reraise=True,
        )
        try:
            return retrying(lambda: _unmasked(action))
        except (FileNotFoundError, FramestreamError, GiveUpError):
            raise
        except Exception as err:  # each fsspec backend raises its own kinds
            if disk_full(err):
                raise
            kind = ShardError if _is_of_the_file(url, err) else StorageError
            if _denied(err):
                verb = "read" if doing == "fetched" else doing
                raise kind(f"{name} cannot be {verb} ({_told(err, url)}): check access rights") from err
            tries = f" in {self.attempts} attempts" if _may_change(err) else ""
            raise kind(
                f"{name} could not be {doing}{tries} ({_told(err, url)}): check the network, the storage and its index"
            ) from err

    def read_small(self, url: str, parse: Callable[[bytes], P]) -> P | None:
        """A small file (an index) read whole and parsed; None when it does not exist.

        What `parse` refuses with a ShardError is read once more, because a body that was cut on its way under a
        wrong length looks like a damaged file.
        """

        def fetch() -> bytes:
            fs, path = self.filesystem(url)
            return self.call(url, lambda: fs.cat_file(path))

        try:
            data = fetch()
            try:
                return parse(data)
            except ShardError:
                return parse(fetch())
        except FileNotFoundError:
            return None

    def size(self, url: str) -> int | None:
        """Bytes of a remote file; None where the server does not say. Raises ShardError when it is not there."""

        def ask() -> int | None:
            fs, path = self.filesystem(url)
            fs.invalidate_cache()  # a listing from before may speak of an older version
            size = fs.info(path).get("size")
            return None if size is None else int(size)

        try:
            return self.call(url, ask)
        except FileNotFoundError as err:
            raise missing(url) from err

    def glob(self, pattern: str) -> dict[str, int | None]:
        """URLs that match, sorted, with their sizes where the storage tells them; {} where there is no such place."""

        def ask() -> dict[str, int | None]:
            fs, path = self.filesystem(pattern)
            fs.invalidate_cache()
            found = fs.glob(path, detail=True)
            return {fs.unstrip_protocol(name): found[name].get("size") for name in sorted(found)}

        try:
            return self.call(pattern, ask)
        except FileNotFoundError:
            return {}


def missing(url: str) -> ShardError:
    """The error for a shard that is not there."""
    if url.startswith("memory://"):
        return ShardError(
            f"shard {shown_url(url)} does not exist in this process: memory:// is each process's own, use num_workers=0"
        )
    return ShardError(f"shard {shown_url(url)} does not exist: check the address")


def _http_limits(stall_s: float) -> dict[str, Any]:
    import aiohttp

    connect = min(CONNECT_S, stall_s)
    return {
        "timeout": aiohttp.ClientTimeout(total=None, connect=None, sock_connect=connect, sock_read=stall_s),
        "headers": {"Accept-Encoding": "identity"},  # ranges and sizes are those of the file itself
    }


def _unmasked(action: Callable[[], T]) -> T:
    """fsspec's HTTP file system says "not found" for whatever kept it from asking; tell the true cause apart."""
    try:
        return action()
    except FileNotFoundError as err:
        cause = err.__cause__
        network = isinstance(cause, (ConnectionError, TimeoutError, asyncio.TimeoutError))
        if cause is None or not (network or type(cause).__module__.startswith("aiohttp.")):
            raise
        if _status(cause) in (404, 410):
            raise
        raise cause from None


def _status(err: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, of botocore, or of s3fs, which translates the latter."""
    for each in (err, err.__cause__):
        if isinstance(status := getattr(each, "status", None), int):
            return status
        if isinstance(response := getattr(each, "response", None), dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None


def _denied(err: BaseException) -> bool:
    return isinstance(err, _DENIED) or type(err).__name__ in _DENIED_NAMES or _status(err) in (401, 403)


def _may_change(err: BaseException) -> bool:
    """Whether another attempt may end otherwise."""
    if not isinstance(err, Exception) or isinstance(err, (FileNotFoundError, FramestreamError, GiveUpError)):
        return False
    return not (_status(err) in _FINAL or _denied(err) or disk_full(err))


def _is_of_the_file(url: str, err: BaseException) -> bool:
    """Whether the error says something about this one file or address, rather than about the storage's state."""
    if _status(err) in (401, 403):
        return False
    return (
        isinstance(err, _FILE_FAULTS)
        or type(err).__name__ in _FILE_FAULT_NAMES
        or _status(err) in _FINAL
        or url.rpartition("::")[2].startswith(_OF_THIS_MACHINE)
    )


def _told(err: BaseException | None, url: str) -> str:
    text = without_secrets(str(err), url)
    return f"{type(err).__name__}: {text}" if text else type(err).__name__
