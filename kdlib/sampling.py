"""Completions: what a model answers to prompts given as token ids.

    temperature 0   greedy: the likeliest token at every position
    temperature t   drawn from softmax(logits / t), token by token

Nothing else shapes the answers: no top-k, no penalty, whatever settings the model's
folder brings. Distillation trains on the model's distribution, so it has to draw from
that one. (Only columns beyond the tokenizer's tokens, which pad the output head, are
never drawn.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from kdlib.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


def complete(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    stop_at_end: bool = True,
    temperature: float = 0.0,
    seeds: Sequence[int | str] | None = None,
    keep_end: bool = False,
) -> list[list[int]]:
    """The completion of each prompt, as token ids.

    prompts:        token ids; batched by length, padded on the left
    max_new_tokens: a completion that has not ended by then is cut there
    stop_at_end:    False makes every completion max_new_tokens long, without the end
                    token (to measure speed, say)
    temperature:    0 is greedy
    seeds:          one a prompt, by default its place. A completion depends on its own
                    seed, not on which prompts stand beside it, nor on torch's generator
    keep_end:       keep the end token, so that a completion without it is known to have
                    been cut

    No gradient is recorded, and the model is left in the mode (train or eval) in which
    it came.
    Raises DataError for an empty prompt, ArgumentError for a bad option.
    """
    if not all(len(prompt) for prompt in prompts):
        raise DataError("a prompt has no token", "give every prompt at least one token")
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature={temperature}", "use 0 (greedy) or more")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise ArgumentError(
            f"{len(seeds)} seeds for {len(prompts)} prompts", "give each prompt a seed"
        )
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    with as_writer(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(prompts[chosen[-1]])
            rows = [
                [pad] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen
            ]
            mask = [
                [0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen
            ]
            pick = Pick(temperature, [seeds[i] for i in chosen], len(tokenizer))
            generated = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                logits_processor=[pick],
                do_sample=False,
                use_cache=True,
                max_new_tokens=max_new_tokens,
                min_new_tokens=None if stop_at_end else max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
            )
            for i, ids in zip(chosen, generated[:, width:].tolist(), strict=True):
                if end in ids:
                    ids = ids[: ids.index(end) + keep_end]
                completions[i] = ids
    return completions


def draw(
    logits: Float[Tensor, "B V"], u: Float[Tensor, " B"], temperature: float
) -> Int64[Tensor, " B"]:
    """A token for each row, from softmax(logits / temperature).

    u: uniform in [0, 1). The cumulative distribution is cut at u: token i is drawn
       where F(i - 1) <= u < F(i), so exactly with its probability
    """
    dtype = widest(logits.device)
    edges = torch.softmax(logits.to(dtype) / temperature, dim=-1).cumsum(-1)
    # The last edge is 1 but for rounding; u must stay below it after its own rounding.
    u = u.to(edges).clamp(max=1 - 4 * torch.finfo(dtype).eps)
    return torch.searchsorted(edges, u[:, None] * edges[:, -1:], right=True)[:, 0]


def widest(device: torch.device) -> torch.dtype:
    """Sums over a large vocabulary lose digits in float32, but MPS has nothing else."""
    return torch.float32 if device.type == "mps" else torch.float64


class Pick:
    """Lets `generate`, which takes the highest score, take the token of our choice.

    tokens: columns that belong to the tokenizer; the others are never taken
    """

    def __init__(self, temperature: float, seeds: list, tokens: int):
        self.temperature, self.tokens = temperature, tokens
        self.generators = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        scores[:, self.tokens :] = -torch.inf
        if self.temperature == 0:
            return scores
        u = [generator.random() for generator in self.generators]
        drawn = draw(scores, torch.tensor(u, dtype=torch.float64), self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn[:, None], 0.0)


@contextmanager
def as_writer(model) -> Iterator[None]:
    """Eval mode and plain settings of generation; then everything as before."""
    from transformers import GenerationConfig

    # Each module on its own: some may be in eval mode while the rest trains.
    modes = {module: module.training for module in model.modules()}
    # peft wraps the model whose settings count.
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = owner.generation_config
    model.eval()
    owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        owner.generation_config = settings
        for module, training in modes.items():
            module.training = training
