"""The configuration of a training run: YAML sections data, model, train, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from framestream.model.metrics import without
from framestream.model.reconstruction_config import ReconstructionConfig
from framestream.model.trainer import TrainSettings
from framestream.pipeline.cache import DEFAULT_CACHE_BYTES
from framestream.pipeline.errors import ConfigError
from framestream.pipeline.sampling import FastSlowSampling, make_sampling

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class DataConfig:
    """Which clips, and what is taken of them.

    Args:
        shards: shards to train on: folder, glob, brace pattern or URL; or a mixture of datasets by name, each with its
            shards and its weight, {films: {shards: shards/films, weight: 3}, cooking: {shards: shards/cooking}}.
        held_out: shards to evaluate on, likewise; null evaluates nothing.
        sampling: which frames of a clip, `kind` fast_slow, dense or length and its settings; null follows from the
            sampling keys of `model` (use_fast_slow_frames, num_fast, num_slow, fast_stride, slow_stride), and there
            without fast-slow frames all `num_fast` newest frames are taken.
        image_size: pixels of the square that the model sees; the short side is resized to it.
        crop: center, or random (drawn once per clip).
        augment: mirror, turn, recolour and invert training clips at random; for small models of pixels and few videos.
        random_end: draw the current moment of each training clip.
        mask: rule that says which frames see which, a name in framestream.pipeline.masks; null follows from the keys of
            `model` (mask, use_frame_causal_mask), and where those say nothing is time_causal for fast and slow frames,
            frame_causal for one stream.
        window_size: frames that `mask: sliding_window` shows, the frame itself included.
        batch_size: clips per batch and process.
        pack_to: tokens of a sequence into which several training clips are packed, so that short ones waste nothing;
            null gives each clip a sequence of its own. Held-out clips are never packed.
        eval_batch_size: clips per evaluation batch; null takes batch_size.
        workers: worker processes that decode; 0 decodes in the training process. Results do not depend on it.
        seed: of order and random choices.
        decoder: a decoder by name, or auto.
        window_shards: shards whose clips are mixed with each other; more is better mixed, fewer needs less local space.
        epoch_samples: clips that make an epoch of a mixture; null takes as many as all its datasets hold.
        storage_options: for remote shards, handed to fsspec: plain values, or sections of plain values.
        cache_dir: where remote shards are kept; null takes the default.
        cache_gb: limit of what is kept of remote shards, in 10^9 bytes.
        checksums: compare each video with the SHA-256 in its shard's metadata before decoding it.
        max_reject_share: stop when more than this share of clips cannot be used.
    """

    shards: str | dict[str, dict[str, str | float]] = ""
    held_out: str | dict[str, dict[str, str | float]] | None = None
    # Plain values only: under `Any`, jsonargparse would import what a `class_path` in the file names.
    sampling: dict[str, int | float | str | None] | None = None
    image_size: int = 224
    crop: Literal["center", "random"] = "center"
    augment: bool = False
    random_end: bool = False
    mask: str | None = None
    window_size: int = 3
    batch_size: int = 8
    pack_to: int | None = None
    eval_batch_size: int | None = None
    workers: int = 2
    seed: int = 0
    decoder: str = "auto"
    window_shards: int = 4
    epoch_samples: int | None = None
    storage_options: dict[str, Plain | dict[str, Plain]] | None = None
    cache_dir: str | None = None
    cache_gb: float = DEFAULT_CACHE_BYTES / 1e9
    checksums: bool = True
    max_reject_share: float = 0.05

    def __post_init__(self) -> None:
        if self.eval_batch_size is not None and self.eval_batch_size < 1:
            raise ConfigError(
                f"data.eval_batch_size must be at least 1, or null for batch_size, got {self.eval_batch_size}."
            )
        if not 0 < self.cache_gb < float("inf"):
            raise ConfigError(f"data.cache_gb must be a positive number of 10^9 bytes, got {self.cache_gb}.")
        if self.seed < 0:
            raise ConfigError(f"data.seed must not be negative, got {self.seed}.")


@dataclass(frozen=True)
class TowerConfig:
    """The frozen vision tower that turns frames into patch embeddings.

    Args:
        kind: pixel (patches of pixels), cosine (the same in a basis in which small motion is visible), torchvision (a
            Vision Transformer by name), or hf (a model of the transformers library, from a folder or hub name).
        name: torchvision: e.g. vit_b_16. hf: the folder or name.
        patch_size: pixel and cosine: side of a patch.
        pretrained: load weights; false keeps the architecture with random ones.
        mean: per channel, subtracted from frames scaled to 0..1; null takes 0 for pixel, ImageNet's for torchvision,
            0.5 for hf.
        std: per channel, divides them; null likewise.
    """

    kind: Literal["pixel", "cosine", "torchvision", "hf"] = "pixel"
    name: str | None = None
    patch_size: int = 16
    pretrained: bool = True
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass(frozen=True)
class ModelConfig(ReconstructionConfig):
    """The keys of the reconstruction module, and its tower.

    Args:
        tower: see `TowerConfig`.
        start_with_differences: let the first block begin as a difference of frames, for small models and short runs; it
            needs at least 3 heads of at least `embedding_dim` channels.
        hidden_size: width of a host model's hidden states; only matters where such states are passed.
    """

    # A config names a rule; functions are for code, since a file must not make anything be imported.
    mask: str | None = None
    tower: TowerConfig = field(default_factory=TowerConfig)
    start_with_differences: bool = False
    hidden_size: int = 32

    def reconstruction(self) -> ReconstructionConfig:
        """The module's own part."""
        names = [f.name for f in dataclasses.fields(ReconstructionConfig)]
        return ReconstructionConfig(**{name: getattr(self, name) for name in names})

    def unset(self, *names: str) -> bool:
        """Whether all of these still have their defaults."""
        return all(getattr(self, name) == getattr(ReconstructionConfig, name) for name in names)


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        data: which clips, and what is taken of them.
        model: the tower and the predictor.
        train: steps, learning rate, checkpoints.
        output: run folder.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainSettings = field(default_factory=TrainSettings)
    output: str = "runs/train"

    def sampling(self) -> dict[str, Any]:
        """The sampling of the data, written out."""
        if self.data.sampling is not None:
            return dict(self.data.sampling)
        model = self.model
        if not model.use_fast_slow_frames:
            return {"kind": "dense", "num_frames": model.num_fast, "stride": model.fast_stride}
        return {
            "kind": "fast_slow",
            "num_fast": model.num_fast,
            "num_slow": model.num_slow,
            "fast_stride": model.fast_stride,
            "slow_stride": model.slow_stride,
            "slow_coverage": model.slow_coverage,
        }

    def mask(self) -> tuple[str, int]:
        """The rule of the data's mask, written out, and the window of `sliding_window`."""
        data, model = self.data, self.model
        if data.mask is not None:
            return data.mask, data.window_size
        if model.mask is not None:
            return model.mask, model.window_size or data.window_size
        both = model.use_frame_causal_mask and isinstance(make_sampling(self.sampling()), FastSlowSampling)
        return "time_causal" if both else "frame_causal", data.window_size

    def reconstruction(self) -> ReconstructionConfig:
        """The settings of the module, with what `data` says about sampling and mask where `model` says nothing.

        A module that is used without this loader then samples and masks as it was trained. What the module's settings
        cannot express, such as strides at a rate of `fps`, stays out.
        """
        model, found = self.model, {}
        if self.data.sampling is not None:
            sampling = make_sampling(self.sampling())
            if isinstance(sampling, FastSlowSampling) and sampling.fps is None:
                found = {name: getattr(sampling, name) for name in ("num_fast", "num_slow", "fast_stride")}
                found["use_fast_slow_frames"] = True
                found = {name: value for name, value in found.items() if model.unset(name)}
                if model.unset("slow_stride", "slow_coverage"):  # which make sense together only
                    found["slow_coverage"] = sampling.slow_coverage
                    if sampling.slow_coverage == "stride":
                        found["slow_stride"] = sampling.slow_stride
        if self.data.mask is not None and model.unset("mask", "window_size", "use_frame_causal_mask"):
            rule, window = self.mask()
            found |= {"mask": rule, "window_size": window if rule == "sliding_window" else None}
        return dataclasses.replace(model.reconstruction(), **found)

    def to_json(self) -> dict[str, Any]:
        """Plain nested values."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run: everything but where it is written and how fast it goes."""
        return without(self.to_json(), NO_PART_OF_THE_RESULT)


#: Places, speeds and intervals: a run may be resumed with other values of these. The loader's own state refuses other
#: data, wherever it lies.
NO_PART_OF_THE_RESULT = (
    "data.shards",
    "data.held_out",
    "data.batch_size",
    "data.workers",
    "data.decoder",
    "data.storage_options",
    "data.cache_dir",
    "data.cache_gb",
    "data.max_reject_share",
    "model.attention_backend",
    "model.gradient_checkpointing",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.log_every",
    "train.tensorboard",
    "train.parallel",
    "train.compile",
    "train.feature_cache",
    "train.feature_cache_gb",
    "train.threads",
    "train.device",
    "train.rollout_steps",
    "output",
)


def find_config(name: str | Path) -> Path:
    """A YAML file by path, or one of the shipped ones by name ("demo").

    Raises:
        ConfigError: there is none; names the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    import framestream.configs

    for folder in map(Path, framestream.configs.__path__):
        shipped = folder / f"{name}.yaml"
        if path.parent == Path() and shipped.is_file():
            return shipped
    names = sorted(p.stem for folder in framestream.configs.__path__ for p in Path(folder).glob("*.yaml"))
    raise ConfigError(f"There is no config file {name}. Give a YAML file, or one of {', '.join(names)}.")


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and apply overrides such as `["--train.steps", "20"]`.

    Raises:
        ConfigError: no such file, no YAML, an unknown key, a value of a wrong type, an impossible value.
    """
    import yaml

    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"{path} cannot be read as YAML: {err}") from err
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold the sections data, model and train, and holds a {type(values).__name__}.")
    return parse(values, overrides, str(path))


def parse(values: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "the configuration") -> TrainConfig:
    """Build the config from nested values and overrides; types are checked against the dataclasses.

    Raises:
        ConfigError: an unknown key, a whole section on the command line, a value of a wrong type or impossible.
    """
    from jsonargparse import ArgumentError

    _check_keys(values, TrainConfig, where)
    _check_options(overrides)
    parser = make_parser()
    try:
        namespace = parser.parse_object(dict(values))
        namespace = parser.parse_args(list(overrides), namespace=namespace)
        made = parser.instantiate(namespace)
    except ArgumentError as err:
        raise ConfigError(f"The configuration is not usable. {_plain(str(err))}") from err
    return TrainConfig(data=made.data, model=made.model, train=made.train, output=made.output)


def make_parser() -> Any:
    """The parser behind `framestream train CONFIG [--section.key value]`; its help lists every key."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="framestream train CONFIG", exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    return parser


def _plain(message: str) -> str:
    """One sentence of jsonargparse's several lines."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return " ".join(lines)


def _sections(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_keys(values: Mapping[Any, Any], kind: type, where: str, prefix: str = "") -> None:
    hints = _sections(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}: {_unknown(f'{prefix}{key}', str(key), known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {prefix}{key} must be a section with keys, and is {value!r}.")
            _check_keys(value, hints[key], where, f"{prefix}{key}.")  # type: ignore[arg-type]


def _unknown(name: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown key {name}{hint}; valid keys there are {', '.join(known)}."


def _check_options(overrides: Sequence[str]) -> None:
    for option in overrides:
        if not option.startswith("--") or option in ("--help", "--"):
            continue
        kind: Any = TrainConfig
        seen = ""
        for part in option[2:].split("=", 1)[0].split("."):
            if not dataclasses.is_dataclass(kind):
                if seen in ("data.shards", "data.held_out"):
                    raise ConfigError(f"{option}: the datasets of a mixture are set in the file, not here.")
                if _is_mapping(kind):
                    break
                raise ConfigError(f"{option}: {seen} is a single value and has no key {part}.")
            known = [f.name for f in dataclasses.fields(kind)]
            if part not in known:
                raise ConfigError(f"command line: {_unknown(f'{seen}.{part}'.lstrip('.'), part, known)}")
            kind, seen = _sections(kind)[part], f"{seen}.{part}".lstrip(".")  # type: ignore[arg-type]
        if dataclasses.is_dataclass(kind):
            # jsonargparse would take a file, or import a class that the value names.
            raise ConfigError(f"command line: {seen} is a section; set its keys, {_EXAMPLES[kind]}.")  # type: ignore[index]


_EXAMPLES = {
    DataConfig: "e.g. --data.batch_size 4",
    ModelConfig: "e.g. --model.num_layers 2",
    TowerConfig: "e.g. --model.tower.kind pixel",
    TrainSettings: "e.g. --train.steps 20",
}


def _is_mapping(kind: Any) -> bool:
    return any(get_origin(part) is dict for part in (kind, *get_args(kind)))


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names and values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
