"""The HF Trainer on two losses: the host model's own, and that of predicting the next frame from its hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from framestream.pipeline.errors import ConfigError, StateError

from .autoregressive_reconstruction import AutoregressiveReconstruction

try:
    from transformers import Trainer
except ImportError as err:
    raise ConfigError("AutoregressiveTrainer needs the transformers library: pip install 'framestream[hf]'.") from err

#: What a batch may hold for the reconstruction beside the host's inputs; `hidden_time` is that of `forward`.
CLIP_KEYS = (
    *("video_frames", "frame_index", "frame_time", "frame_stream", "frame_valid", "frame_clip", "frame_mask"),
    *("frame_position_ids", "block_mask", "fill_rate", "keys", "text", "meta", "hidden_time"),
)
NAME = "autoregressive_reconstruction"
LOSS = "autoregressive_loss"


class AutoregressiveTrainer(Trainer):
    """Trains a host model and an `AutoregressiveReconstruction` on the sum of their losses.

    A batch holds the host's inputs and `video_frames [B, T, 3, H, W]`, either alone (then the module's settings choose
    the frames) or with the other keys of a loader's batch. The host is asked for its hidden states; the last ones
    condition the prediction, and gradients flow back through them; what `attention_mask` leaves out is not read. States
    that have seen later frames would give them away: put their times into the batch as `hidden_time [B, S]`.

    Logged, averaged over the window since the last line and over all ranks: `loss`, and its two parts `main_loss` and
    `autoregressive_loss` (which `loss_weight` has been applied to). Under gradient accumulation the main loss is
    weighted by tokens, as the Trainer does it, and the reconstruction is the mean over the parts. An evaluation logs
    `eval_loss`, `eval_main_loss` and `eval_autoregressive_loss`, with the labels of the batch or of `host_inputs`.

    For a `ClipLoader`: `class ClipTrainer(LoaderTrainerMixin, AutoregressiveTrainer)`.

    Args:
        reconstruction: the module. It becomes `model.autoregressive_reconstruction` where it is no part of the model
            yet, so that optimiser, wrappers and checkpoints know it. None: the model has one.
        args, kwargs: of the Trainer.

    Raises:
        ConfigError: no module, or several; several GPUs in one process; `torch_compile`; later, a batch without
            `video_frames`, a model that gives no hidden states, or an evaluation without labels.
        StateError: on resume, a checkpoint lacks trained parameters, of which the Trainer alone would only warn.
    """

    def __init__(self, *args: Any, reconstruction: AutoregressiveReconstruction | None = None, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if reconstruction is not None:
            if model is None:
                raise ConfigError("A reconstruction comes with a model; with model_init, put it into the model there.")
            if all(part is not reconstruction for part in model.modules()):
                setattr(model, NAME, reconstruction)
        if model is not None:
            _reconstruction_in(model)
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"The Trainer would copy the model to {self.args.n_gpu} GPUs in one process; start one process per GPU "
                "with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES."
            )
        if self.args.torch_compile:
            raise ConfigError(
                "torch_compile would trace both losses as one; compile parts instead: the host's layers, and "
                "`for block in reconstruction.predictor.blocks: block.compile()`."
            )
        self._sums = torch.zeros(2)  # main and reconstruction loss since the last log
        self._since: int | None = None  # the step at which these begin
        self._host: dict[str, Any] | None = None  # inputs that an evaluation step has made already
        self._last = torch.zeros(2)  # main and reconstruction loss of the batch before
        self._measured: list[Tensor] = []  # these of an evaluation's clips

    def host_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the host model is called with; override it to make tokens of `text`, say.

        By default all but `CLIP_KEYS`, and of these the ones that its `forward` names.
        """
        named = inspect.signature(self.accelerator.unwrap_model(self.model).forward).parameters
        return {name: value for name, value in inputs.items() if name not in CLIP_KEYS or name in named}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Main loss plus weighted reconstruction loss; see the class."""
        if not isinstance(inputs.get("video_frames"), Tensor):
            raise ConfigError(
                f"A batch for AutoregressiveTrainer needs video_frames [B, T, 3, H, W], and this one has "
                f"{', '.join(map(str, inputs)) or 'nothing'}: let the data set and the collator keep them (with "
                "remove_unused_columns=False, if they are dropped on the way)."
            )
        host = {**(self._host or self.host_inputs(inputs)), "output_hidden_states": True}
        with self._reconstructing(model, inputs, host.get("attention_mask")) as found:
            main, outputs = super().compute_loss(model, host, True, num_items_in_batch)
        parts = self.current_gradient_accumulation_steps if model.training else 1
        # The Trainer divides what this returns by the parts, unless the main loss is one over the whole step already.
        whole_step = self._is_scaled(num_items_in_batch)
        auto = found[0] / (parts if whole_step else 1)
        self._last = both = torch.stack([main.detach().float(), auto.detach().float()])
        if model.training:
            if self._since is None:
                self._since = self.state.global_step
            self._sums = self._sums.to(both.device) + both / (1 if whole_step else parts)
        loss = main + auto
        if not return_outputs:
            return loss
        kept = {name: value for name, value in outputs.items() if name != "hidden_states"}
        if inputs.get("output_hidden_states"):
            kept["hidden_states"] = outputs["hidden_states"]
        return loss, type(outputs)(**kept)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """That of the Trainer, which looks for labels in the batch alone, with those of `host_inputs`.

        Raises:
            ConfigError: neither has them.
        """
        inputs = self._prepare_inputs(inputs)
        self._host = host = self.host_inputs(inputs)
        labels = {name: inputs.get(name) if host.get(name) is None else host[name] for name in self.label_names}
        if lacking := [name for name, value in labels.items() if value is None]:
            raise ConfigError(
                f"An evaluation needs {', '.join(lacking)}, and neither the batch nor host_inputs has them: add them "
                "there, or set label_names=[] in the TrainingArguments where the host has a loss without labels."
            )
        self.can_return_loss |= not labels  # there is one all the same
        try:
            result = super().prediction_step(model, {**inputs, **labels}, prediction_loss_only, ignore_keys)
        finally:
            self._host = None
        # As the Trainer averages the loss, so that the parts add up to it.
        self._measured.append(self.gather_function(self._last.repeat(self.args.eval_batch_size, 1)).cpu())
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """That of the Trainer, with the two parts of its loss among the metrics."""
        self._measured = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._measured:
            main, auto = torch.cat(self._measured).mean(0).tolist()
            output.metrics.update({f"{metric_key_prefix}_main_loss": main, f"{metric_key_prefix}_{LOSS}": auto})
        self._measured = []
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the two parts to a line that has the `loss` of training."""
        if "loss" in logs and self._since is not None and self.state.global_step > self._since:
            steps = self.state.global_step - self._since
            main, auto = (self.accelerator.gather(self._sums).view(-1, 2).mean(0) / steps).tolist()
            logs = {"loss": logs["loss"], "main_loss": main, LOSS: auto, **logs}
            self._sums, self._since = torch.zeros(2), None
        super().log(logs, *args, **kwargs)

    def _is_scaled(self, num_items: Tensor | int | None) -> bool:
        said = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return bool(said)
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    @contextmanager
    def _reconstructing(
        self, model: nn.Module, batch: Mapping[str, Any], attention_mask: Any
    ) -> Iterator[Sequence[Tensor]]:
        """For one call, the host's forward pass goes on to the reconstruction, whose loss is then in what this gives.

        Inside that of the wrapper: DDP looks for parameters without a gradient in what its forward pass gave, and FSDP
        has weights at hand within it only. Whoever called the wrapper sees the host's own outputs.
        """
        host = self.accelerator.unwrap_model(model)
        module = _reconstruction_in(host)
        forward, own = host.forward, host.__dict__.get("forward")
        found: list[Tensor] = []
        bare = False  # a single tensor of hidden states

        def restore() -> None:
            if own is None:
                host.__dict__.pop("forward", None)
            else:
                host.forward = own

        def both(*args: Any, **kwargs: Any) -> Any:
            nonlocal bare
            restore()
            outputs = forward(*args, **kwargs)
            states = _states(outputs, host)
            bare = isinstance(outputs["hidden_states"], Tensor)
            with self.accelerator.autocast():  # that of the host is around its own forward pass alone
                auto = _reconstruct(module, batch, states[-1], attention_mask)
            # In a field that the outputs have: DDP takes them apart and makes them anew from their fields.
            outputs["hidden_states"] = (auto, *states)
            return outputs

        def take(_model: nn.Module, _inputs: Any, outputs: Any) -> Any:
            auto, *states = outputs["hidden_states"]
            found.append(auto)
            outputs["hidden_states"] = states[0] if bare else tuple(states)
            return outputs

        host.forward = both
        hook = model.register_forward_hook(take)
        try:
            yield found
        finally:
            hook.remove()
            restore()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        super()._issue_warnings_after_load(load_result)
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if lost := trained.intersection(load_result.missing_keys):
            raise StateError(
                f"The checkpoint has no weights under the names of {len(lost)} trained parameters, {min(lost)} first: "
                "they would begin anew. Some models write other names than they have, and the Trainer does not turn "
                "them back: give model.save_pretrained the argument save_original_format=False."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        columns += [name for name in CLIP_KEYS if name not in columns]


def _reconstruction_in(model: nn.Module) -> AutoregressiveReconstruction:
    found = [part for part in model.modules() if isinstance(part, AutoregressiveReconstruction)]
    if len(found) != 1:
        raise ConfigError(
            f"AutoregressiveTrainer found {len(found) or 'no'} reconstruction modules in {type(model).__name__}, and "
            f"needs one: set model.{NAME}, or give it as reconstruction=."
        )
    return found[0]


def _states(outputs: Any, host: nn.Module) -> tuple[Tensor, ...]:
    states = outputs.get("hidden_states") if isinstance(outputs, dict) else None
    states = (states,) if isinstance(states, Tensor) else tuple(states or ())
    if not states:
        got = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ConfigError(
            f"{type(host).__name__} was called with output_hidden_states=True and gave no hidden_states, but {got}: "
            "the reconstruction is conditioned on them. Let it return a dict (or ModelOutput) that holds them."
        )
    return states


def _reconstruct(
    module: AutoregressiveReconstruction, batch: Mapping[str, Any], states: Tensor, attention_mask: Any
) -> Tensor:
    when = batch.get("hidden_time")
    if isinstance(attention_mask, Tensor) and attention_mask.shape == states.shape[:2]:
        padding = attention_mask == 0
        if padding.any():
            if when is None:
                when = torch.full(states.shape[:2], -torch.inf, device=states.device)
            when = when.masked_fill(padding, torch.inf)
    if "frame_index" in batch:
        return module(batch, states, when).loss
    return module.compute_autoregressive_loss(
        states, batch["video_frames"], hidden_time=when, frame_time=batch.get("frame_time")
    )
