"""Where the plan of an output lies: beside local shards; of remote ones it is built here, then copied there."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from framestream.pipeline.atomic import TEMP_SUFFIX
from framestream.pipeline.cache import default_cache_dir
from framestream.pipeline.errors import ConfigError

from .output import LocalOutput, Output, RemoteOutput
from .plan_schema import JOURNAL_SUFFIX, PlanError
from .plan_store import PlanStore

PLAN_FILE = ".plan.sqlite"
NEW_PLAN_FILE = ".plan.sqlite.new"  # until it is known that it may take the place of another


class PlanPlace:
    """The plan's file.

    Args:
        work: folder for the plans of remote outputs while they are built; None for one in the cache.
    """

    def __init__(self, output: Output, work: str | Path | None = None) -> None:
        self._output = output
        self.folder = (
            output.folder
            if isinstance(output, LocalOutput)
            else Path(work or default_cache_dir() / "plans") / hashlib.sha256(output.identity.encode()).hexdigest()[:16]
        )
        self.path = self.folder / PLAN_FILE
        self._published = False

    def prepare(self) -> None:
        """Make the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise ConfigError(f"folder {self.folder} cannot be made ({err.strerror}): name one with `work`") from err

    def fetch(self) -> None:
        """Take the plan that lies beside a remote output: another machine may have made it, or planned anew."""
        if isinstance(self._output, RemoteOutput):
            fetched = self.path.with_name(self.path.name + ".fetched")
            self._published = self._output.download(PLAN_FILE, fetched)
            if self._published:
                _journal(self.path).unlink(missing_ok=True)  # it belongs to the plan that goes
                os.replace(fetched, self.path)

    def begun(self) -> PlanStore | None:
        """The plan that an earlier run began; None where nothing is worth keeping of it.

        Raises:
            PlanError: it is damaged, or of another version of framestream.
        """
        self.fetch()
        if not self.path.exists():
            return None
        plan = PlanStore.open(self.path)
        if plan.stage != "listing":
            return plan
        with plan:
            pass
        self.remove()
        return None

    def new(self) -> Path:
        """Where a plan is begun that will take the place of another, with `take_new`."""
        path = self.path.with_name(NEW_PLAN_FILE)
        for left in (path, _journal(path), *self.folder.glob(f".{NEW_PLAN_FILE}*{TEMP_SUFFIX}")):
            left.unlink(missing_ok=True)
        return path

    def take_new(self) -> PlanStore:
        """The new plan, which nobody has open, in its place."""
        os.replace(self.path.with_name(NEW_PLAN_FILE), self.path)
        return PlanStore.open(self.path)

    def decided(self) -> PlanStore:
        """The whole plan, for reading. Raises ConfigError where there is none."""
        if self.path.exists():
            try:
                plan = PlanStore.open(self.path, readonly=True)
            except PlanError as err:
                raise ConfigError(f"{err}, with plan_only and overwrite") from err
            if plan.stage == "decided":
                return plan
            with plan:
                pass
        raise ConfigError(f"{self._output.place} has no finished plan: make it first, with plan_only")

    def publish(self) -> None:
        """Copy the finished plan beside a remote output, where it is not yet there."""
        if isinstance(self._output, RemoteOutput) and not self._published:
            self._output.upload(self.path, PLAN_FILE)
            self._published = True

    def remove(self) -> None:
        """Remove the plan everywhere."""
        self._output.remove(PLAN_FILE)
        self._published = False
        for path in (_journal(self.path), self.path):
            path.unlink(missing_ok=True)


def _journal(path: Path) -> Path:
    return path.with_name(path.name + JOURNAL_SUFFIX)
