"""A vision-language model trained on two losses at once by the HF Trainer: real steps of a tiny random LLaVA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from framestream.pipeline.errors import ConfigError, StateError

import torchrun

pytest.importorskip("transformers")
from framestream.model import AutoregressiveTrainer

from vision_language_job import (
    HIDDEN,
    Clips,
    arguments,
    evaluations,
    language_model,
    lines,
    reconstruction_of,
    trainer_of,
    weights,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An unbroken run with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, save_strategy="steps", save_steps=4, max_steps=8)
    trainer.train()
    return trainer


def test_both_losses_go_down_and_are_logged(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=24, logging_steps=6)
    tower = trainer.model.model.vision_tower.state_dict()
    before = {name: value.clone() for name, value in tower.items()}
    trainer.train()
    found = lines(trainer)
    assert [line["step"] for line in found] == [6, 12, 18, 24]
    for line in found:
        assert line["loss"] == pytest.approx(line["main_loss"] + line["autoregressive_loss"], rel=1e-5)
    assert found[-1]["main_loss"] < 0.5 * found[0]["main_loss"]
    assert found[-1]["autoregressive_loss"] < 0.7 * found[0]["autoregressive_loss"]
    assert all(torch.equal(before[name], value) for name, value in tower.items())  # frozen


def test_the_parts_are_those_of_a_loop_written_by_hand(whole: Any, tmp_path: Path) -> None:
    """The first two steps, with the batches that the Trainer gives and a plain optimiser."""
    trainer = trainer_of(tmp_path)
    model = trainer.model.train()
    module = model.autoregressive_reconstruction
    optimizer = trainer.create_optimizer()
    torch.manual_seed(trainer.args.seed)
    main_sum = auto_sum = 0.0
    for batch, _ in zip(trainer.get_train_dataloader(), range(2), strict=False):
        video = batch.pop("video_frames")
        out = model(**batch, output_hidden_states=True)
        when = torch.where(batch["attention_mask"] == 0, torch.inf, -torch.inf)
        auto = module.compute_autoregressive_loss(out.hidden_states[-1], video, hidden_time=when)
        (out.loss + auto).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        main_sum, auto_sum = main_sum + out.loss.item(), auto_sum + auto.item()
    first = lines(whole)[0]
    assert first["main_loss"] == pytest.approx(main_sum / 2, rel=1e-4)
    assert first["autoregressive_loss"] == pytest.approx(auto_sum / 2, rel=1e-4)


def test_what_is_padded_is_not_read() -> None:
    from framestream.model.hf_trainer import _reconstruct

    module = reconstruction_of(language_model())
    module.predictor.appear.weight.data.normal_()
    states, mask = torch.randn(2, 5, 32), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"video_frames": torch.rand(2, 6, 3, 16, 16)}
    want = _reconstruct(module, batch, states, mask)
    wild = states.clone()
    wild[1, 3:] = 100.0
    assert torch.equal(_reconstruct(module, batch, wild, mask), want)
    assert not torch.equal(_reconstruct(module, batch, wild, None), want)
    early = {**batch, "hidden_time": torch.tensor([[0.0, 9, 9, 9, 9]] * 2)}
    timed = _reconstruct(module, early, states, mask)
    wild[:, 1:] = 7.0  # none of these has been seen yet
    assert torch.equal(_reconstruct(module, early, wild, mask), timed)


@pytest.mark.slow
def test_accumulated_parts_are_one_step(whole: Any, tmp_path: Path) -> None:
    parts = trainer_of(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    assert len(lines(parts)) == 4
    for one, other in zip(lines(whole), lines(parts), strict=True):
        assert other == pytest.approx(one, rel=2e-3)
    # The same again where the Trainer knows no number of items.
    unknown = trainer_of(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=2)
    unknown.model_accepts_loss_kwargs = False
    unknown.train()
    (line,) = lines(unknown)
    assert line["autoregressive_loss"] == pytest.approx(lines(whole)[0]["autoregressive_loss"], rel=2e-3)
    assert line["loss"] == pytest.approx(line["main_loss"] + line["autoregressive_loss"], rel=1e-5)


def test_a_checkpoint_resumes_exactly(whole: Any, tmp_path: Path) -> None:
    again = trainer_of(tmp_path)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))
    assert lines(again) == lines(whole)
    assert weights(again) == weights(whole)
    from safetensors.torch import load_file

    saved = load_file(Path(whole.args.output_dir) / "checkpoint-8" / "model.safetensors")
    assert any(name.startswith("autoregressive_reconstruction.predictor.") for name in saved)
    assert not any(name.startswith("autoregressive_reconstruction.tower.") for name in saved)


def test_a_checkpoint_without_some_weights_is_refused(whole: Any, tmp_path: Path) -> None:
    """The Trainer alone says in a warning that they begin anew."""
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(Path(whole.args.output_dir) / "checkpoint-4", checkpoint)
    saved = load_file(checkpoint / "model.safetensors")
    renamed = {name.replace("predictor.blocks.0", "predictor.block0"): value for name, value in saved.items()}
    save_file(renamed, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StateError, match=r"no weights under the names of \d+ trained parameters, .*save_original_format"
    ):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_evaluation_has_both_losses_and_the_hosts_outputs_alone(whole: Any) -> None:
    metrics = whole.evaluate(Clips(4))
    found = whole.predict(Clips(4))
    assert metrics["eval_loss"] == pytest.approx(found.metrics["test_loss"])
    uneven = whole.evaluate(Clips(11))  # a last batch of 3
    assert uneven["eval_main_loss"] + uneven["eval_autoregressive_loss"] == pytest.approx(uneven["eval_loss"])
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    assert logits.shape == (4, 22, 64)
    batch = {name: value[None] for name, value in Clips()[0].items()}
    with torch.no_grad():
        loss, outputs = whole.compute_loss(whole.model.eval(), dict(batch), return_outputs=True)
        video = batch.pop("video_frames")
        plain = whole.model(**batch, output_hidden_states=True)
        states = plain.hidden_states[-1]
        when = torch.where(batch["attention_mask"] == 0, torch.inf, -torch.inf)
        module = whole.model.autoregressive_reconstruction
        auto = module.compute_autoregressive_loss(states, video, hidden_time=when)
    assert type(outputs) is type(plain)
    assert outputs.hidden_states is None
    assert "autoregressive_loss" not in outputs
    torch.testing.assert_close(loss, plain.loss + auto)
    assert "forward" not in vars(whole.model)


def test_the_reconstruction_runs_in_the_precision_of_the_host(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1, bf16=True)
    seen: dict[str, torch.dtype] = {}
    layers = {"own": trainer.model.autoregressive_reconstruction.predictor.blocks[0].qkv, "host": trainer.model.lm_head}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.dtype))
    trainer.train()
    assert seen == {"own": torch.bfloat16, "host": torch.bfloat16}


def test_a_loss_function_sees_the_hosts_own_hidden_states(tmp_path: Path) -> None:
    seen: list[list[torch.Size]] = []

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        seen.append([state.shape for state in outputs.hidden_states])
        return outputs.logits.float().square().mean()

    trainer = trainer_of(tmp_path, max_steps=1, logging_steps=1)
    trainer.compute_loss_func = loss
    trainer.train()
    assert seen == [[(4, 22, HIDDEN)] * 3]
    (line,) = lines(trainer)
    assert line["loss"] == pytest.approx(line["main_loss"] + line["autoregressive_loss"], rel=1e-5)


def test_a_loaders_batch_is_taken_as_it_is(tmp_path: Path) -> None:
    from framestream.pipeline.frameworks import LoaderTrainerMixin

    from loader_setup import make_loader, write_shards

    class ClipTrainer(LoaderTrainerMixin, AutoregressiveTrainer):
        def host_inputs(self, inputs: Any) -> dict[str, Any]:
            rows = [Clips()[int(text.split()[-1])] for text in inputs["text"]]
            names = ("input_ids", "attention_mask", "labels", "pixel_values")
            return {name: torch.stack([row[name] for row in rows]) for name in names}

    shards = write_shards(tmp_path / "shards", 8, 4)
    loader = make_loader(shards, image_size=16, patches_per_frame=16, batch_size=4)
    model = language_model()
    trainer = ClipTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
        train_loader=loader,
        reconstruction=reconstruction_of(model),
    )
    trainer.train()
    first, second = lines(trainer)
    assert second["main_loss"] < first["main_loss"]
    assert loader.state_dict()["epoch"] == 1
    # The labels are made by host_inputs, once for a batch.
    calls: list[int] = []
    make = trainer.host_inputs
    trainer.host_inputs = lambda inputs: calls.append(1) or make(inputs)
    held_out = make_loader(shards, image_size=16, patches_per_frame=16, batch_size=4, shuffle=False)
    metrics = trainer.evaluate(held_out)
    assert metrics["eval_main_loss"] + metrics["eval_autoregressive_loss"] == pytest.approx(metrics["eval_loss"])
    assert metrics["eval_autoregressive_loss"] > 0
    assert len(calls) == 2
    trainer.host_inputs = lambda inputs: {name: value for name, value in make(inputs).items() if name != "labels"}
    with pytest.raises(ConfigError, match=r"needs labels, and neither the batch nor host_inputs has them"):
        trainer.evaluate(held_out)
    trainer.host_inputs, trainer.label_names = make, []  # as of a host that has a loss without labels
    assert trainer.evaluate(held_out)["eval_autoregressive_loss"] == metrics["eval_autoregressive_loss"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    def fails(trainer: Any, said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            trainer.train()

    class Without(Clips):
        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            return {name: value for name, value in super().__getitem__(number).items() if name != "video_frames"}

    fails(trainer_of(tmp_path, data=Without()), r"needs video_frames .* has input_ids, .*remove_unused_columns=False")
    trainer = trainer_of(tmp_path, remove_unused_columns=False)
    forward = trainer.model.forward
    trainer.model.forward = lambda **inputs: {"loss": forward(**inputs).loss}
    fails(trainer, r"gave no hidden_states, but loss")
    model = language_model()
    with pytest.raises(ConfigError, match=r"found no reconstruction modules in Llava"):
        AutoregressiveTrainer(model=model, args=arguments(tmp_path))
    model.one, model.two = reconstruction_of(model), reconstruction_of(model)
    with pytest.raises(ConfigError, match=r"found 2 reconstruction modules"):
        AutoregressiveTrainer(model=model, args=arguments(tmp_path))
    with pytest.raises(ConfigError, match=r"torch_compile would trace"):
        trainer_of(tmp_path, torch_compile=True)
    with pytest.raises(ConfigError, match=r"with model_init, put it into the model"):
        AutoregressiveTrainer(model_init=language_model, args=arguments(tmp_path), reconstruction=model.one)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(whole: Any, tmp_path: Path) -> None:
    ranks = torchrun.run("vision_language_job.py", 2, tmp_path)
    for rank in ranks:
        for run in rank.values():
            assert len(run["lines"]) == 4
            for one, other in zip(lines(whole), run["lines"], strict=True):
                assert other == pytest.approx(one, rel=2e-3)
            for evaluation in run["evaluation"].values():
                assert evaluation["main_loss"] + evaluation["autoregressive_loss"] == pytest.approx(evaluation["loss"])
            assert run["evaluation"]["16"] == pytest.approx(evaluations(whole)["16"], rel=2e-3)
            assert run["weights"] == pytest.approx(weights(whole), rel=1e-2, abs=1e-3)
    assert ranks[0] == ranks[1]
