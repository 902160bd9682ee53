"""Decoding inside the workers of a real DataLoader, forked and spawned."""

from __future__ import annotations

import pytest
import torch

from framestream.pipeline.decode import available_backends, open_decoder

from decode_helpers import DecodeInWorker


@pytest.mark.parametrize(
    ("backend", "start"),
    [("pyav", "fork"), ("pyav", "spawn"), ("decord", "fork"), ("decord", "spawn"), ("auto", "fork")],
)
def test_workers_decode(clip: bytes, backend: str, start: str) -> None:
    if backend != "auto" and available_backends()[backend]:
        pytest.skip(available_backends()[backend])
    with open_decoder(clip, backend="decord" if backend == "decord" else "pyav") as decoder:
        decoder.frames_at([3])  # a reader that was used before the workers start must not harm them
        loader = torch.utils.data.DataLoader(
            DecodeInWorker(clip, backend, 12), batch_size=2, num_workers=2, multiprocessing_context=start
        )
        assert [item for batch in loader for item in batch] == ["ok"] * 12
        assert decoder.frames_at([3]).shape[0] == 1
