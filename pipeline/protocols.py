"""Which kinds of storage may be named by a URL."""

from __future__ import annotations

from .errors import ConfigError
from .redaction import shown_url, without_secrets

# fsspec's own caches keep what they know as pickles in some versions, and references are templates that it renders.
_REFUSED = ("cached", "filecache", "blockcache", "simplecache", "reference")


def refuse(url: str) -> None:
    """Raise ConfigError for protocols by which a URL or its options could make something run."""
    for part in url.split("::"):
        protocol = part.partition("://")[0]
        if protocol in _REFUSED:
            raise ConfigError(
                f"{shown_url(url)}: fsspec's {protocol} may run what its files or options hold, and is not used; name "
                "the storage itself, the loader has a cache of its own (cache_dir)."
            )


def check_protocol(url: str) -> None:
    """Whether the file systems that a URL names are known and allowed; none is made, so nothing is connected to.

    Raises:
        ConfigError: one is not, or its package is not installed (then the cause is an ImportError).
    """
    import fsspec

    refuse(url)
    links = url.split("::")
    for link in links:
        protocol, sep, _ = link.partition("://")
        if not sep and (len(links) == 1 or not protocol.isalpha()):
            continue  # a local path
        try:
            fsspec.get_filesystem_class(protocol)
        except (ValueError, ImportError) as err:
            raise unopenable(url, err) from err


def unopenable(url: str, err: Exception) -> ConfigError:
    """The error for a URL that fsspec does not take."""
    why = without_secrets(str(err), url)
    return ConfigError(f"{shown_url(url)} cannot be opened by fsspec ({why}): check protocol and options")
