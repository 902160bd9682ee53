"""A sharding run in its three steps: plan everything, make the shards (all, or a part of them), finish the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from framestream.pipeline.atomic import TEMP_SUFFIX
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.remote import Remote
from framestream.pipeline.shard_writer import FOLDER_INDEX

from .engines import Engine, NumberedProbe
from .inputs import Source, Unusable, list_inputs, nothing_found
from .making import encoder_version
from .output import Output, read_all
from .plan_listing import settings_difference
from .plan_place import PlanPlace
from .plan_store import PlannedShard, PlanStore
from .probing import ProbeTask
from .set_files import LEFT_OUT_FILE, REJECTS_FILE, REPORT_FILE
from .shard_options import ShardOptions
from .shard_report import ShardReport, finish
from .units import Outcome, files_of, finished, our_files, unit_name, units_of

PLAN_VERSION = 2
LOCK_FILE = ".lock"

Progress = Callable[[str, int, int | None, int], None]  # step, done, of (None: not known yet), rejects


class Part(NamedTuple):
    """Every `of`-th shard, from the `number`-th (1 to `of`) on."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`3/8`. Raises ConfigError."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ConfigError(f"part is {text!r}, it has to be I/N with I from 1 to N, such as 3/8")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class Unfinished(NamedTuple):
    """A set of which so many shards are there, of how many; other parts make the rest."""

    num_finished: int
    num_shards: int


@dataclass
class ShardJob:
    """One output, and how it is made. The steps can be run again at any time; what is done already is kept.

    Attributes:
        work: folder for the plan of a remote output while it is built; None for one in the cache.
    """

    output: Output
    options: ShardOptions
    engine: Engine
    remote: Remote
    progress: Progress = lambda step, done, total, rejects: None
    work: str | Path | None = None
    place: PlanPlace = field(init=False)

    def __post_init__(self) -> None:
        self.place = PlanPlace(self.output, self.work)

    @contextmanager
    def alone(self, part: Part | None = None) -> Iterator[None]:
        """Hold the output for this run, or for this part of one. Raises ConfigError where another run has it."""
        from filelock import FileLock, Timeout

        self.output.prepare("")
        self.place.prepare()
        name = LOCK_FILE if part is None else f"{LOCK_FILE}-{part.number}-of-{part.of}"
        try:
            with FileLock(str(self.place.folder / name), timeout=0):
                yield
        except Timeout as err:
            raise ConfigError(
                f"another run is writing to {self.output.place}: wait for it or name another folder"
            ) from err

    # --- the plan -------------------------------------------------------------------------------------------------

    def plan(self, inputs: Sequence[str], *, overwrite: bool = False) -> PlanStore:
        """The decided plan: the one that is there, where inputs and options are the same, or a new one.

        Raises:
            ConfigError: impossible options, no video in the inputs, or an output that belongs to another run.
        """
        settings = self._settings()
        if overwrite:
            self._clear()
        plan = self.place.begun()
        with ExitStack() as stack:
            if plan is None:
                self._refuse_foreign()
                plan = self._list(stack, settings, inputs)
            else:
                stack.enter_context(plan)
                if difference := plan.difference(settings, list_inputs(inputs, remote=self.remote)):
                    raise ConfigError(
                        f"{self.output.place} holds the shards of another run ({difference}): name another output "
                        "folder, or set overwrite to remove what is there"
                    )
            plan.check_splits(self.options)
            if plan.stage == "probing":
                self._probe(plan)
                plan.decide(self.options, lambda done, total: self.progress("deciding", done, total, plan.num_rejected))
                stack.close()
                self.place.publish()
        return self.place.decided()

    def check(self, plan: PlanStore) -> None:
        """Whether a plan that is there is of this job's options. Raises ConfigError."""
        if difference := settings_difference(plan.settings, self._settings()):
            raise ConfigError(
                f"the plan in {self.output.place} is of other options ({difference}): give those it was made with"
            )

    def _settings(self) -> dict[str, Any]:
        version = {} if self.options.transcode == "never" else {"encoder": encoder_version(self.options)}
        return {"version": PLAN_VERSION, "options": {**self.options.to_json(), **version}}

    def _list(self, stack: ExitStack, settings: Mapping[str, Any], inputs: Sequence[str]) -> PlanStore:
        other_files: Counter[str] = Counter()
        plan = stack.enter_context(PlanStore.create(self.place.path, settings))

        def counted() -> Iterator[Source | Unusable]:
            for number, item in enumerate(list_inputs(inputs, remote=self.remote, other_files=other_files), start=1):
                yield item
                self.progress("listing", number, None, 0)

        plan.add_inputs(counted(), other_files)
        self.progress("listing", plan.num_inputs, plan.num_inputs, plan.num_rejected)
        if not plan.num_inputs:
            stack.close()
            self.place.remove()
            raise ConfigError(nothing_found(inputs, other_files))
        return plan

    def _probe(self, plan: PlanStore) -> None:
        threshold = self.options.cutting.scene_threshold
        probes = (
            NumberedProbe(number, ProbeTask(source, threshold, self.remote)) for number, source in plan.to_probe()
        )
        with self.engine:
            for number, outcome in self.engine.probe(probes):
                plan.record(number, outcome)
                self.progress("probing", plan.num_probed, plan.num_to_probe, plan.num_rejected)

    def _refuse_foreign(self) -> None:
        """An output without a plan must not have tars: they are not ours to replace."""
        for folder in ("", "train", "val"):
            if foreign := next((name for name in sorted(self.output.sizes(folder)) if name.endswith(".tar")), None):
                raise ConfigError(f"{self.output.place} has {foreign} from elsewhere: name an empty output folder")

    def _clear(self) -> None:
        """Remove what an earlier run of ours wrote, and only that."""
        splits, prefix = {"", "train", "val"}, self.options.prefix
        try:
            plan = self.place.begun()
        except ConfigError:  # a damaged plan says nothing: what this run would write has to go
            pass
        else:
            if plan is None:
                return
            with plan:
                prefix = str(plan.settings["options"]["prefix"])
                splits |= set(plan.splits()) if plan.stage == "decided" else set()
        for split in sorted(splits):
            names = self.output.sizes(split)
            ours = [*our_files(names, prefix), *(name for name in names if name.endswith(TEMP_SUFFIX)), FOLDER_INDEX]
            for name in ours:
                self.output.remove(f"{split}/{name}" if split else name)
        for name in (REPORT_FILE, REJECTS_FILE, LEFT_OUT_FILE):
            self.output.remove(name)
        self.place.remove()

    # --- the shards -----------------------------------------------------------------------------------------------

    def write(self, plan: PlanStore, part: Part | None = None) -> None:
        """Make the shards that are missing, of all or of one part."""
        if part is None:
            self._sweep(plan)
        todo, done, total, lost = [], 0, 0, 0
        for shard, outcome in self.outcomes(plan, part):
            total += shard.num_clips
            if outcome is None:
                todo.append(shard)
            else:
                done, lost = done + shard.num_clips, lost + len(outcome.lost)
        self.progress("writing", done, total, plan.num_rejected + lost)
        for split in {shard.split for shard in todo}:
            self.output.prepare(split)
        with self.engine:
            for step in self.engine.write(units_of(plan, todo, self.options, self.remote), self.output):
                done, lost = done + step.clips, lost + step.lost
                self.progress("writing", done, total, plan.num_rejected + lost)

    def _sweep(self, plan: PlanStore) -> None:
        """Remove what killed runs left unfinished, and shards of ours that the plan does not have."""
        for split in plan.splits():
            units = (unit_name(self.options, shard) for shard in plan.shards(split))
            planned = {name.rpartition("/")[2] for unit in units for name in files_of(unit)}
            names = self.output.sizes(split)
            left = [name for name in our_files(names, self.options.prefix) if name not in planned]
            left += [name for name in names if name.startswith(".") and name.endswith(TEMP_SUFFIX)]
            for name in left:
                self.output.remove(f"{split}/{name}" if split else name)

    def outcomes(self, plan: PlanStore, part: Part | None = None) -> Iterator[tuple[PlannedShard, Outcome | None]]:
        """All shards in order, or those of a part, with what became of them; None where that is still to come."""
        sizes: dict[str, int] = {}
        for split in plan.splits():
            sizes |= {f"{split}/{name}" if split else name: n for name, n in self.output.sizes(split).items()}

        def wanted() -> Iterator[PlannedShard]:
            for number, shard in enumerate(plan.shards()):
                if part is None or number % part.of == part.number - 1:
                    yield shard

        def index_of(shard: PlannedShard) -> str | None:
            tar, index, lost = files_of(unit_name(self.options, shard))
            name = index if tar in sizes else lost
            return name if name in sizes else None

        files = read_all(self.output, map(index_of, wanted()))
        for shard, data in zip(wanted(), files, strict=True):
            name = unit_name(self.options, shard)
            yield shard, finished(shard, name, sizes.get(files_of(name)[0]), data)

    def finish(self, plan: PlanStore) -> ShardReport | Unfinished:
        """Write index and report, where all shards are there."""
        outcomes = [(shard.split, outcome) for shard, outcome in self.outcomes(plan)]
        whole = [(split, outcome) for split, outcome in outcomes if outcome is not None]
        if len(whole) < len(outcomes):
            return Unfinished(len(whole), len(outcomes))
        return finish(plan, whole, self.output)
