"""The teachers: one protocol, and where its three kinds come from.

A teacher is anything with `targets(batch)`: it reads the teacher's view of a
PairedBatch and returns one target a response token, in the batch's order: logits
[N, V], or SparseTargets. It gets no gradient and trains nothing.

    LiveTeacher    runs a model at every batch
    CachedTeacher  reads targets that write_cache or write_shards wrote once
    RemoteTeacher  asks a server (vLLM's protocol) at every batch
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from kdlib.cached import CachedTeacher, fingerprint
from kdlib.remote import RemoteTeacher
from kdlib.sparse_targets import SparseTargets
from kdlib.target_cache import write_cache, write_shards
from kdlib.views import PairedBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = [
    "CachedTeacher",
    "LiveTeacher",
    "RemoteTeacher",
    "Teacher",
    "fingerprint",
    "write_cache",
    "write_shards",
]

# What a config says of a file or a library, not of the function that the model is.
NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version"}
# Of SmolLM2-135M's weights an eighth; of a model of billions as many a tensor.
SIGNS = 2**16


class Teacher(Protocol):
    """What `train` and `evaluate` ask of a teacher."""

    def targets(self, batch: PairedBatch) -> Float[Tensor, "N V"] | SparseTargets:
        """The target of each response token, row after row."""
        ...


class LiveTeacher:
    """A causal language model that is asked at every batch.

    The model is put in eval mode (dropout in the teacher would be noise in the
    target), keeps its own dtype, and stays frozen: targets carry no gradient.
    """

    def __init__(self, model):
        self.model = model.eval()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    # Not inference_mode: autograd may save targets for the student's backward pass,
    # which it refuses for tensors made there.
    @torch.no_grad()
    def targets(self, batch: PairedBatch) -> Float[Tensor, "N V"]:
        view = batch.teacher.to(self.device)
        logits = view.output_of(self.model).logits
        return view.select(logits).to(batch.response_ids.device)

    def signs(self) -> str:
        """sha256 of the signs of at most SIGNS weights of each tensor, evenly spread.

        Cheap where `fingerprint` reads gigabytes, and the same in every dtype and on
        every device: rounding keeps signs. Another training leaves other signs: one
        step of AdamW turns those of weights smaller than its learning rate. A change
        of some tensors' scale alone is not seen.
        """
        total = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            some = flat[:: -(-len(flat) // SIGNS) or 1].cpu()
            signs = torch.signbit(some.float() if some.is_floating_point() else some)
            total.update(name.encode())
            total.update(np.packbits(signs.numpy()).tobytes())
        return total.hexdigest()

    def fingerprint(self) -> str:
        """sha256 of the weights, in their dtype, and of the config."""
        config = self.model.config.to_dict()
        told = {
            name: value
            for name, value in config.items()
            if name not in NOT_THE_MODEL and not name.startswith("_")
        }
        total = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy())
        return total.hexdigest()
