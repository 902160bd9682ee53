"""Addresses as messages and reports may show them: without passwords, and without the signatures of signed ones.

Only what is shown is changed. What is asked for, and the plan that says so, keeps the addresses as they were given.
"""

from __future__ import annotations

import re

_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*)@")
_CONTAINERS = ("abfs", "abfss", "az", "adl", "wasb", "wasbs")  # have `container@account` where others have a user
_WEB_QUERY = r"(https?://[^?#{ends}]*)[?#][^{ends}]*"
# In other storage a name may have a `?`: only what looks like a setting is none of the name.
_QUERY = r"(://(?:(?!::)[^?{ends}])*)\?[^/?=&{ends}]*=(?:(?!::)[^{ends}])*"
_IN_TEXT = r"\s'\"<>)"  # what an address ends at


def _queries(ends: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    return re.compile(_WEB_QUERY.format(ends=ends), re.IGNORECASE), re.compile(_QUERY.format(ends=ends))


_WHOLE, _WITHIN = _queries(r"\0"), _queries(_IN_TEXT)


def shown_url(url: str) -> str:
    """A URL as it may be shown; a local path stays as it is."""
    return _without(url, _WHOLE)


def without_secrets(text: str, url: str = "") -> str:
    """A message with all addresses in it as they may be shown.

    Args:
        url: the address that the message is about, of which parts are also found where they stand alone.
    """
    if "://" in url:
        text = text.replace(url, shown_url(url))
        for secret in _secrets(url):
            text = text.replace(secret, "")
    return _without(text, _WITHIN)


def _without(text: str, queries: tuple[re.Pattern[str], re.Pattern[str]]) -> str:
    text = _USER.sub(_host, text)
    for query in queries:
        text = query.sub(r"\1", text)
    return text


def _host(match: re.Match[str]) -> str:
    protocol, user = match.groups()
    return match[0] if protocol in _CONTAINERS and ":" not in user else f"{protocol}://"


def _secrets(url: str) -> list[str]:
    """The query of a URL as it is asked for, and what stands before its host."""
    query = url[len(shown) :] if url.startswith(shown := shown_url(url)) else "?" + url.partition("?")[2]
    users = [f"{match[2]}@" for match in _USER.finditer(url) if match[0] != _host(match)]
    return [secret for secret in (query, *users) if len(secret) > 1]
