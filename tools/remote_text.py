"""A small remote file in memory, and no more of it than it may have."""

from __future__ import annotations

from framestream.pipeline.remote import Remote


def read_at_most(url: str, remote: Remote, limit: int) -> bytes:
    """The bytes of a remote file of at most `limit` bytes. Of a longer one no more than a few megabytes are fetched.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has more bytes.
        ConfigError, ShardError, OSError: as `Remote.call` does.
    """
    fs, path = remote.filesystem(url)

    def fetch() -> bytes:
        fs.invalidate_cache()  # it may remember the length of an older version
        with fs.open(path, "rb") as file:
            data: bytes = file.read(limit + 1)
        return data

    data = remote.call(url, fetch)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data
