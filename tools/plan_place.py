"""Where the plan of an output lies: beside local shards; of remote ones it is built here, then copied there."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from framestream.pipeline.cache import default_cache_dir
from framestream.pipeline.errors import ConfigError

from .output import LocalOutput, Output, RemoteOutput
from .plan_schema import PlanError
from .plan_store import PlanStore

PLAN_FILE = ".plan.sqlite"


class PlanPlace:
    """The plan's file.

    Args:
        work: folder for the plan of a remote output while it is built; None for one in the cache.
    """

    def __init__(self, output: Output, work: str | Path | None = None) -> None:
        self._output = output
        if isinstance(output, LocalOutput):
            self.folder = output.folder
        else:
            name = hashlib.sha256(output.place.encode()).hexdigest()[:16]
            self.folder = Path(work) if work else default_cache_dir() / "plans" / name
        self.path = self.folder / PLAN_FILE

    def prepare(self) -> None:
        """Make the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(f"folder {self.folder} cannot be made ({err.strerror}): name one with `work`") from err

    def begun(self) -> PlanStore | None:
        """The plan that an earlier run began; None where nothing is worth keeping of it.

        Raises:
            ConfigError: it is damaged, or of another version of framestream.
        """
        self.fetch()
        if not self.path.exists():
            return None
        try:
            plan = PlanStore.open(self.path)
        except PlanError as err:
            raise ConfigError(f"{err}, or set overwrite") from err
        if plan.stage != "listing":
            return plan
        with plan:
            pass
        self.path.unlink()
        return None

    def decided(self) -> PlanStore:
        """The whole plan, for reading. Raises ConfigError where there is none."""
        if self.path.exists():
            plan = PlanStore.open(self.path, readonly=True)
            if plan.stage == "decided":
                return plan
            with plan:
                pass
        raise ConfigError(f"{self._output.place} has no finished plan: make it first, with plan_only")

    def publish(self) -> None:
        """Copy the finished plan beside a remote output."""
        if isinstance(self._output, RemoteOutput):
            self._output.upload(self.path, PLAN_FILE)

    def remove(self) -> None:
        """Remove the plan everywhere."""
        self._output.remove(PLAN_FILE)
        for suffix in ("", "-journal"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).unlink()

    def fetch(self) -> None:
        """Take the plan that lies beside a remote output: another machine may have made it, or planned anew."""
        if isinstance(self._output, RemoteOutput):
            self._output.download(PLAN_FILE, self.path)
