"""The two kinds of remote storage that the tests read from, both on 127.0.0.1 and both behind a `FaultProxy`."""

from __future__ import annotations

import http.client
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from framestream.pipeline.shards import ShardSet

from fault_proxy import FaultProxy, RangeServer, running

QUICK: dict[str, Any] = {"backoff_s": 0.001, "stall_s": 20.0}  # tests have no time to wait
BUCKET = "bucket"


@dataclass
class Storage:
    """A folder's files, to be had at `url`; `proxy` is what requests pass through."""

    url: str  # of the folder
    proxy: FaultProxy
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def open(self, shards: str = "", **settings: Any) -> ShardSet:
        """The set of the folder, or of what `shards` names in it."""
        where = f"{self.url}/{shards}" if shards else self.url
        return ShardSet.open(where, storage_options=self.options, **{**QUICK, **settings})

    def cache_settings(self, **settings: Any) -> dict[str, Any]:
        """What a `ShardCache` needs to read from here."""
        return {"storage_options": self.options, **QUICK, **settings}

    def served(self) -> dict[str, int]:
        """How often each tar was asked for."""
        counts: dict[str, int] = {}
        for request in list(self.proxy.requests):
            name = request.path.partition("?")[0].rpartition("/")[2]
            if request.method == "GET" and name.endswith(".tar"):
                counts[name] = counts.get(name, 0) + 1
        return counts


@contextmanager
def http_storage(folder: Path) -> Iterator[Storage]:
    """A web server over `folder`."""
    with running(RangeServer(folder)) as server, running(FaultProxy(server.url)) as proxy:
        yield Storage(proxy.url, proxy, folder)


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server; its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


@contextmanager
def s3_storage(folder: Path, server: str, prefix: str) -> Iterator[Storage]:
    """The files of `folder`, uploaded under `prefix` to the S3 server at the address `server`."""
    upload(server, folder, prefix)
    with running(FaultProxy(server)) as proxy:
        options = {"key": "none", "secret": "none", "client_kwargs": {"endpoint_url": proxy.url}}
        yield Storage(f"s3://{BUCKET}/{prefix}", proxy, folder, options)


def upload(server: str, folder: Path, prefix: str) -> None:
    """Put the files of `folder` into the bucket."""
    s3_request(server, "PUT", "")
    for path in folder.rglob("*"):
        if path.is_file():
            name = quote(path.relative_to(folder).as_posix())
            s3_request(server, "PUT", f"/{prefix}/{name}", path.read_bytes())


def s3_request(server: str, method: str, key: str, data: bytes = b"") -> None:
    """Ask the S3 server for something; it wants a signature and does not check it."""
    signature = "AWS4-HMAC-SHA256 Credential=none/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection = http.client.HTTPConnection(server.removeprefix("http://"))
    connection.request(method, f"/{BUCKET}{key}", body=data, headers={"Authorization": signature})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    assert answer.status in (200, 204, 409), (method, key, answer.status)  # 409: the bucket is there already
