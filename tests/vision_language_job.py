"""A tiny LLaVA with random weights on the AutoregressiveTrainer; as a script one rank of a job that torchrun starts."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from framestream.model.autoregressive_reconstruction import AutoregressiveReconstruction
from framestream.model.hf_trainer import AutoregressiveTrainer

HIDDEN, SIDE, PATCH, FRAMES = 32, 16, 4, 6
IMAGE_TOKEN, PAD, WORDS = 63, 0, 6
SETTINGS = {
    "embedding_dim": 24, "predictor_dim": 24, "num_heads": 2, "num_layers": 1, "loss_weight": 1.0, "target_norm": True,
}  # fmt: skip


def language_model(seed: int = 0) -> Any:
    """LLaVA of some ten thousand weights: CLIP's vision tower, Llama's layers.

    It would write its weights under the names of an older version, under which the Trainer does not find them again.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=24, intermediate_size=32, image_size=SIDE, patch_size=PATCH, projection_dim=24, **sizes
            ),
            text_config=LlamaConfig(
                vocab_size=64, hidden_size=HIDDEN, intermediate_size=64, max_position_embeddings=64, **sizes
            ),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-1,
        )
    )
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


def reconstruction_of(model: Any, **settings: Any) -> AutoregressiveReconstruction:
    """A module around the model's own vision tower."""
    torch.manual_seed(1)
    return AutoregressiveReconstruction(model.model.vision_tower, HIDDEN, {**SETTINGS, **settings})


class Clips(Dataset[dict[str, Tensor]]):
    """Videos that repeat two pictures, and a caption that counts; captions have different lengths."""

    def __init__(self, count: int = 16) -> None:
        self.count = count
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.rand(4, 3, SIDE, SIDE, generator=generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        pair = self.pictures[[number % 2, 2 + number % 2]]
        video = pair[torch.arange(FRAMES) % 2]
        words = 2 + number % (WORDS - 1)
        caption = torch.full((WORDS,), PAD)
        caption[:words] = torch.arange(words) + 10 + number % 2
        tokens = torch.cat([torch.full(((SIDE // PATCH) ** 2,), IMAGE_TOKEN), caption])
        return {
            "input_ids": tokens,
            "attention_mask": (tokens != PAD).long(),
            "labels": tokens.masked_fill((tokens == PAD) | (tokens == IMAGE_TOKEN), -100),
            "pixel_values": video[0],
            "video_frames": video,
        }


def arguments(folder: Path, **settings: Any) -> Any:
    from transformers import TrainingArguments

    defaults = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 2,
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **settings})


def trainer_of(folder: Path, kind: Any = AutoregressiveTrainer, data: Any = None, **settings: Any) -> Any:
    """A trainer of a fresh model with a fresh module."""
    args = arguments(folder, **settings)  # which join the process group
    model = language_model()
    return kind(model=model, args=args, train_dataset=data or Clips(), reconstruction=reconstruction_of(model))


def lines(trainer: Any) -> list[dict[str, float]]:
    """What was logged of training."""
    names = ("step", "loss", "main_loss", "autoregressive_loss")
    return [{name: row[name] for name in names} for row in trainer.state.log_history if "loss" in row]


def evaluations(trainer: Any) -> dict[str, dict[str, float]]:
    """The loss and its parts on full batches of 8, and where the last one is not full."""
    found = {count: trainer.evaluate(Clips(count)) for count in (16, 11)}
    names = ("loss", "main_loss", "autoregressive_loss")
    return {str(count): {name: metrics[f"eval_{name}"] for name in names} for count, metrics in found.items()}


def weights(trainer: Any) -> dict[str, float]:
    """A number for each parameter that is trained."""
    return {name: float(p.detach().double().norm()) for name, p in trainer.model.named_parameters() if p.requires_grad}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for name, settings in {
        "plain": {},
        "unused": {"ddp_find_unused_parameters": True},
        "parts": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    }.items():
        defaults = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": False}
        trainer = trainer_of(folder, **{**defaults, **settings})
        trainer.train()
        result[name] = {"lines": lines(trainer), "weights": weights(trainer), "evaluation": evaluations(trainer)}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
