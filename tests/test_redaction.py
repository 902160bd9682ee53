"""Addresses in messages show no passwords and no signatures, and nothing else is taken from them."""

from __future__ import annotations

import pytest

from framestream.pipeline.errors import ConfigError
from framestream.pipeline.protocols import check_protocol
from framestream.pipeline.redaction import shown_url, without_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a.mp4?X-Amz-Signature=SECRET&x=1", "https://host/a.mp4"),
        ("https://me:SECRET@host/a.mp4", "https://host/a.mp4"),
        ("ftp://me:SECRET@host:21/a.mp4", "ftp://host:21/a.mp4"),
        ("zip://in/a.mp4::https://me:SECRET@host/x.zip", "zip://in/a.mp4::https://host/x.zip"),
        ("abfs://container@account/a.mp4", "abfs://container@account/a.mp4"),
        ("s3://bucket/what?.mp4", "s3://bucket/what?.mp4"),
        ("/videos/a@b?c.mp4", "/videos/a@b?c.mp4"),
    ],
)
def test_what_is_shown_of_an_address(url: str, shown: str) -> None:
    assert shown_url(url) == shown
    message = without_secrets(f"{url} could not be fetched (Error: '{url}', twice)", url)
    assert "SECRET" not in message
    assert shown in message
    assert "could not be fetched" in message


@pytest.mark.parametrize("url", ["cached::file:///a", "zip://x::filecache::s3://b/a", "nothing://a/b"])
def test_protocols_that_could_run_something_or_are_unknown_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        check_protocol(url)


def test_no_connection_is_made_to_check_a_protocol() -> None:
    check_protocol("ftp://me:pw@127.0.0.1:1/x.mp4")
    check_protocol("s3://bucket/x.mp4")
