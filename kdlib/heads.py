"""An output head: what a model does between its last hidden states and its logits.

Knows: a causal LM's last matrix, and what may scale or cap the logits behind it. Does
not know what is done with the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdlib.errors import ModelError
from kdlib.sharding import decoder_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Head:
    """An output head: logits = cap(scale * (hidden W^T + bias)).

    weight:  [V, H]
    bias:    [V] or None
    scale:   multiplies the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)
    softcap: c > 0 for cap(z) = c tanh(z / c) (Gemma), or None
    """

    weight: Float[Tensor, "v h"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model) -> Head:
        """The head of a Hugging Face causal LM, checked on a few tokens.

        Models disagree about what multiplies the logits and under which name. So the
        guess from the config is compared with the model's own logits.

        Raises ModelError where the two differ.
        """
        config, linear = model.config.get_text_config(), model.get_output_embeddings()
        head = cls(
            linear.weight,
            getattr(linear, "bias", None),
            getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1),
            getattr(config, "final_logit_softcapping", None),
        )
        tokens = torch.arange(min(8, len(linear.weight)), device=linear.weight.device)
        with torch.no_grad():
            # Not output_hidden_states: for that transformers puts hooks into the blocks
            # and leaves them there, where they stop torch.compile.
            output = model(tokens[None], use_cache=False)
            decoder = decoder_of(model)
            hidden = decoder(tokens[None], use_cache=False).last_hidden_state
            rebuilt = head.logits(hidden)
        gap = (rebuilt - output.logits).abs().max() / output.logits.abs().max()
        if not gap <= max(1e-5, 2 * torch.finfo(rebuilt.dtype).eps):
            raise ModelError(
                f"{type(model).__name__}: logits differ by {gap:.1e} (relative) from"
                " cap(scale * (hidden W^T + bias))",
                "build Head(weight, bias, scale, softcap) by hand, or do not fuse",
            )
        return head

    def logits(self, hidden: Float[Tensor, "*n h"]) -> Float[Tensor, "*n v"]:
        """All logits at once: the meaning that the fused path must equal."""
        return self.shape(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def shape(self, logits: Tensor) -> Tensor:
        """Scale, then soft cap."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
