"""Completions: what a model answers to prompts given as token ids.

Greedy for now; the student's and the teacher's own samples (on-policy and
sequence-level distillation) belong here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdlib.errors import DataError


@torch.inference_mode()
def complete(
    model,
    tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 256,
    stop_at_end: bool = True,
) -> list[list[int]]:
    """The greedy completion of each prompt, as token ids without the end token.

    prompts:        token ids; batched by length, padded on the left
    max_new_tokens: a completion that has not ended by then is cut there
    stop_at_end:    False makes every completion max_new_tokens long, without the end
                    token (to measure speed, say)

    The model is left in the mode (train or eval) in which it came.
    Raises DataError for an empty prompt.
    """
    if not all(len(prompt) for prompt in prompts):
        raise DataError("a prompt has no token", "give every prompt at least one token")
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(prompts[chosen[-1]])
            rows = [
                [pad] * (width - len(prompts[i])) + list(prompts[i]) for i in chosen
            ]
            mask = [
                [0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen
            ]
            generated = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                min_new_tokens=None if stop_at_end else max_new_tokens,
                eos_token_id=end,
                pad_token_id=pad,
            )
            for i, ids in zip(chosen, generated[:, width:].tolist(), strict=True):
                completions[i] = ids[: ids.index(end)] if end in ids else ids
    finally:
        model.train(was_training)
    return completions
