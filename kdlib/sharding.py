"""torch's engines for several devices, and what they ask of a training loop.

    DDP     every rank has the whole student; gradients are averaged
    FSDP2   every rank has 1/world of all weights, gradients and moments, and of the
            teacher's weights; a block's weights are gathered while it computes

Both average over ranks, and a loss is a sum over them (distributed.py). So each rank's
loss is multiplied by their number: mean_r(world * g_r) = sum_r g_r.

Source: Li et al. 2020 (arXiv 2006.15704) for DDP; Zhao et al. 2023 (arXiv 2304.11277)
for FSDP, whose second version is torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MethodType

import torch
from torch.nn.parallel import DistributedDataParallel

from kdlib.distributed import Ranks
from kdlib.errors import ModelError

Tensors = dict[str, torch.Tensor]


def replicated(loss_of: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """A module of the student, and of nothing else that is trained, under DDP."""
    return DistributedDataParallel(
        loss_of,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def shard(model: torch.nn.Module, ranks: Ranks) -> None:
    """Split a causal LM's weights among the ranks, in place: block by block, then the
    rest. All ranks must hold the same weights before.

    Raises ModelError where the blocks cannot be told.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    blocks = blocks_of(model)
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks", "train without --shard"
        )
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Weights are gathered by `forward`, and by other methods that are named here.
    model.forward_decoder = MethodType(_forward_decoder, model)
    register_fsdp_forward_method(model, "forward_decoder")


def blocks_of(model) -> list[torch.nn.Module]:
    """A causal LM's blocks, which are alike; empty where they cannot be told."""
    modules = model.get_decoder().modules()
    return list(next((m for m in modules if isinstance(m, torch.nn.ModuleList)), []))


def decoder_of(model):
    """What a causal LM computes hidden states with, sharded or not."""
    return getattr(model, "forward_decoder", None) or model.get_decoder()


def _forward_decoder(model, **inputs):
    return model.get_decoder()(**inputs)


def summing(loss_of: torch.nn.Module, last: bool) -> AbstractContextManager:
    """For a micro-batch: DDP sends gradients once a step, after the last one."""
    if last or not isinstance(loss_of, DistributedDataParallel):
        return nullcontext()
    return loss_of.no_sync()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor itself, or what a sharded one is in full. All ranks together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_model(model, device: torch.device | str, *, here: bool = True):
    """A copy of a sharded model in one piece, on a device; in eval mode.

    All ranks together: every rank gathers one tensor after another, and keeps them if
    it is `here` that the copy is wanted; else it gets None. The copy needs the memory
    of the whole model, once more.
    """
    from transformers import AutoModelForCausalLM

    parts = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        full = whole(tensor.detach())
        if here:
            parts[name] = full.to(device, copy=True)
    if not here:
        return None
    with torch.device("meta"):  # no memory for weights that are replaced
        copy = AutoModelForCausalLM.from_config(model.config)
        for name, settings in getattr(model, "peft_config", {}).items():
            peft = importlib.import_module("peft")
            copy = peft.get_peft_model(copy, settings, adapter_name=name)
    weights = dict(copy.named_parameters())
    for name, part in parts.items():
        module, _, leaf = name.rpartition(".")
        if name in weights:
            part = torch.nn.Parameter(part, weights[name].requires_grad)
        setattr(copy.get_submodule(module), leaf, part)
    base = copy.get_base_model() if hasattr(copy, "get_base_model") else copy
    base.tie_weights()
    base.generation_config = model.generation_config
    return copy.eval()


# --- Checkpoints: every rank writes and reads what it holds ---


def weights_and_moments(student, optimizer: torch.optim.AdamW) -> Tensors:
    """All tensors of a run, by name, in place: reading into them restores the run."""
    found = {}
    for name, parameter in student.named_parameters():
        found[f"weight.{name}"] = parameter.detach()
        if parameter.requires_grad:
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}.{name}"] = _moments(optimizer, parameter)[key]
    return found


def steps_of(student, optimizer: torch.optim.AdamW) -> dict[str, float]:
    """How often AdamW has moved each weight: its correction of the bias needs that."""
    return {
        name: _moments(optimizer, parameter)["step"].item()
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    }


def set_steps(student, optimizer: torch.optim.AdamW, steps: dict[str, float]) -> None:
    """Undo `steps_of`. Raises KeyError for a weight that was not trained then."""
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            _moments(optimizer, parameter)["step"].fill_(steps[name])


def write_shards(tensors: Tensors, folder: Path) -> None:
    """Each rank its own part, as safetensors. Raises OSError, on all ranks."""
    import torch.distributed.checkpoint as dcp

    _quiet()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.CheckpointException as error:
        raise OSError(_reasons(error)) from error


def read_shards(tensors: Tensors, folder: Path) -> None:
    """Fill the tensors, however many ranks wrote them. Raises ValueError."""
    import torch.distributed.checkpoint as dcp

    _quiet()
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        dcp.load(tensors, storage_reader=reader)
    except dcp.CheckpointException as error:
        raise ValueError(_reasons(error)) from error


def _moments(optimizer: torch.optim.AdamW, parameter) -> dict:
    """AdamW's state of one weight, which it would make itself at its first step."""
    state = optimizer.state[parameter]
    if not state:
        # float32 also for other weights, and on their device: what `fused` expects.
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def _reasons(error) -> str:
    """What each rank that failed says, without its traceback."""
    return "; ".join(f"rank {r}: {e[0]}" for r, e in error.failures.items())


def _quiet() -> None:
    """Let torch.distributed.checkpoint speak of errors alone."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
