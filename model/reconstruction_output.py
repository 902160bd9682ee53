"""What the reconstruction module's forward pass gives."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass
class ReconstructionOutput:
    """What one forward pass found out. B clips of F frames.

    Attributes:
        loss: scalar, already times `loss_weight`; with `rollout_steps`, in train mode, with the rollout's error.
        frame_error: float32 `[B, F]`, error of the prediction made at each frame, mean over patches and channels, in
            the units of the loss without its weight; NaN where the frame has no target, or one left out as leaking.
        copy_last_error: the same for predicting that nothing changes.
        leaking_targets: how many targets the mask lets their query see.
        targets: how many targets are in the loss. With none the loss is 0, and still part of the graph.
        predictions: `[B, F, P, D]`, what each frame predicts of its next; where streams have fewer patches than
            P, zeros fill up.
    """

    loss: Tensor
    frame_error: Tensor
    copy_last_error: Tensor
    leaking_targets: int
    targets: int
    predictions: Tensor


# Wrappers such as FSDP2 hook the tensors of a module's output, and find them only in types that torch knows. The
# public name for this, torch.export.register_dataclass, would cost every import a second and a half.
register_pytree_node(
    ReconstructionOutput,
    lambda output: ([getattr(output, field.name) for field in fields(output)], None),
    lambda values, _: ReconstructionOutput(*values),
    serialized_type_name="framestream.ReconstructionOutput",
)
