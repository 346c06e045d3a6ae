"""Weights in few bits, and training that knows of it.

    quantise(weight, bits)     whole numbers, and one scale a row
    dequantise(whole, scale)   the weights that the model then computes with
    FakeQuantised(model, bits) the model as it will be once quantised, yet trainable

Every matrix of a model is quantised, the embedding too; a tied head is the same matrix
and is quantised once. Norms are few numbers and stay as they are. Activations are not
touched: this is weight-only quantisation.

Knows matrices. Does not know kernels: a model that was quantised here computes in
float32 with the rounded weights, so its quality is real and its speed is not.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Float, Int8
    from torch import Tensor

BITS = range(2, 9)


def quantise(
    weight: Float[Tensor, "out in"], bits: int
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out 1"]]:
    """Symmetric, one scale an output channel: k = round(w / s), |w - s k| <= s / 2.

        s = max_j |w_j| / ((2^b - 1) / 2),   k in [-2^(b-1), 2^(b-1) - 1]

    This is torchao's rule for MappingType.SYMMETRIC. All 2^b whole numbers are in use:
    the largest weight lies half a step outside on the positive side, and is clamped.
    A row of zeros has the scale 1.

    Raises ArgumentError for bits outside 2 to 8, or a weight that is no matrix.
    """
    if bits not in BITS:
        raise ArgumentError(f"bits={bits}", "use 2 to 8 bits")
    if weight.dim() != 2:
        raise ArgumentError(
            f"a weight of shape {list(weight.shape)}", "give a matrix [out, in]"
        )
    largest = weight.detach().abs().amax(1, keepdim=True)
    scale = largest / ((2**bits - 1) / 2)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = (weight.detach() * (1 / scale)).round().clamp(lowest, highest)
    return whole.to(torch.int8), scale


def dequantise(
    whole: Int8[Tensor, "out in"], scale: Float[Tensor, "out 1"]
) -> Float[Tensor, "out in"]:
    return whole.to(scale.dtype) * scale


def straight_through(weight: Float[Tensor, "out in"], bits: int):
    """The quantised weights in value, the weights themselves in gradient.

    Rounding has the derivative zero almost everywhere, so nothing would ever be
    learned. The straight-through estimator takes it for the identity (Bengio et al.
    2013, arXiv 1308.3432). The scale follows the weights here, so that a clamped weight
    is never more than half a step outside, and its gradient passes as well.
    """
    return weight + (dequantise(*quantise(weight, bits)) - weight).detach()


class FakeQuantised(torch.nn.Module):
    """A causal LM that computes with quantised weights and trains the ones behind them.

    Train it as any student; then `quantised(model, bits)` is what was trained. `model`
    is the very module that was given, and its float weights are what moves.
    """

    def __init__(self, model, bits: int):
        super().__init__()
        if bits not in BITS:
            raise ArgumentError(f"bits={bits}", "use 2 to 8 bits")
        self.model, self.bits = model, bits

    @property
    def config(self):
        return self.model.config

    def get_decoder(self):
        return self.model.get_decoder()

    def forward(self, *args, **kwargs):
        # A tied head is the same parameter under its first name, and follows.
        weights = {
            name: straight_through(p, self.bits) if p.dim() == 2 else p
            for name, p in self.model.named_parameters()
        }
        return torch.func.functional_call(self.model, weights, args, kwargs)


@torch.no_grad()
def quantised(model, bits: int):
    """A copy of the model with every matrix rounded to `bits` bits, in eval mode."""
    found = copy.deepcopy(model).eval()
    for p in found.parameters():
        if p.dim() == 2:
            p.copy_(dequantise(*quantise(p, bits)))
    return found


def stored_bytes(model, bits: int | None = None) -> float:
    """Bytes of the weights in a file, without its header; tied matrices count once.

    b / 8 for a number of a matrix and 4 for each row's scale; 4 for a number of a norm.
    bits: None is float32.
    """
    total = 0.0
    for p in model.parameters():
        matrix = bits is not None and p.dim() == 2
        total += p.numel() * bits / 8 + 4 * len(p) if matrix else 4 * p.numel()
    return total
