"""In what precision to compute, by what the device can do.

The weights stay float32: under autocast, matrix products run on copies in 16 bits, and
an update too small for 16 bits still moves the weight.

    bf16  float32's range with 8 bits of precision: no gradient underflows
    fp16  11 bits of precision and little range: the loss is scaled up before the
          backward pass, and a step whose gradients overflow is left out
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from kdlib.errors import ArgumentError, TrainingError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Below this scale the gradients themselves are not finite, at whatever scale.
LOWEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class Precision:
    """name: "fp32", "bf16" or "fp16"; device: "cuda", "cpu" or "mps"."""

    name: str = "fp32"
    device: str = "cpu"

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """What to use on a device; `name` may be "auto".

        Raises ArgumentError for bf16 on a card that only emulates it.
        """
        # Not torch.cuda.is_bf16_supported: it is True for a T4, which emulates bf16 at
        # a fraction of its fp16 speed.
        native = (
            device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8
        )
        if name == "bf16" and not native:
            raise ArgumentError(
                f"precision='bf16' on {torch.cuda.get_device_name(device)}",
                "use precision='fp16' or 'auto': bf16 needs compute capability 8.0",
            )
        if name == "auto":
            name = "fp32"
            if device.type == "cuda":
                name = "bf16" if native else "fp16"
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device, DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16; in the other precisions it does nothing."""
        return torch.amp.GradScaler(self.device, enabled=self.name == "fp16")


def trained_weights(student) -> list[torch.nn.Parameter]:
    """The parameters to train.

    Raises ArgumentError where there is none, or one that is not float32 or float64.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained:
        raise ArgumentError(
            "no parameter of the student requires a gradient",
            "unfreeze some: parameter.requires_grad_(True)",
        )
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            raise ArgumentError(
                f"the student's {name} is {parameter.dtype}",
                "train with student.float(); TrainConfig.precision chooses what the "
                "computation is done in",
            )
    return trained


def check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Raise TrainingError where no scale makes fp16's gradients finite."""
    if scaler.is_enabled() and scaler.get_scale() < LOWEST_SCALE:
        raise TrainingError(
            f"step {step}: gradients overflow in fp16, at a loss scale of "
            f"{scaler.get_scale():.1e} still",
            "train with precision='fp32' (or 'bf16' on a newer card)",
        )
