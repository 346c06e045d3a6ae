"""Speculative decoding: a small draft writes ahead, the large model corrects it.

    overlap(p, q)          how likely a drafted token is kept: 1 - TVD(p, q)
    verify(p, q, ...)      which of the drafted tokens are kept, and the one after them
    speculate(...)         whole answers, distributed as the large model's own

p is the large model's distribution, the one that is wanted, q the draft's. The two may
read different prompts: a distilled student needs no context.

Source: Leviathan et al. 2022 (arXiv 2211.17192), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdlib.errors import ArgumentError
from kdlib.sampling import draw

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def overlap(p: Float[Tensor, "... v"], q: Float[Tensor, "... v"]):
    """sum_v min(p, q) = 1 - TVD(p, q): the chance that a token drawn from q is kept."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Float[Tensor, " v"], q: Float[Tensor, " v"]) -> Float[Tensor, " v"]:
    """Where a rejected token is drawn anew: max(0, p - q), scaled to sum 1.

    Where p = q nothing is ever rejected; p itself is returned.
    """
    missing = (p - q).clamp(min=0)
    total = missing.sum(-1, keepdim=True)
    return torch.where(total > 0, missing / total, p)


def verify(
    p: Float[Tensor, "k1 v"],
    q: Float[Tensor, "k v"],
    drafted: Sequence[int],
    u: Float[Tensor, " k1"],
) -> list[int]:
    """The tokens that are kept of `drafted`, and one more from the large model.

    p: distributions at the k drafted places and at the one after them
    q: the distributions that the draft drew from
    u: uniform in [0, 1): one for each acceptance, the last for the token added

    Token x is kept if u < min(1, p(x) / q(x)). At the first that is not, one is drawn
    from the residual and the rest is thrown away. If all are kept, p gives one more.
    """
    if not len(p) == len(q) + 1 == len(drafted) + 1 == len(u):
        raise ArgumentError(
            f"{len(p)} rows of p, {len(q)} of q, {len(drafted)} tokens, {len(u)} of u",
            "give p and u one row more than q and drafted",
        )
    for place, token in enumerate(drafted):
        if u[place] * q[place, token] >= p[place, token]:
            last = residual(p[place], q[place])
            return [*drafted[:place], _drawn(last, u[-1])]
    return [*drafted, _drawn(p[-1], u[-1])]


def _drawn(p, u) -> int:
    return draw(p.log()[None], u[None], 1.0).item()


@dataclass(frozen=True)
class Spoken:
    """An answer, and what it took.

    passes:   of the large model; expected: sum of 1 - TVD over the judged tokens
    judged:   drafted tokens that came to be judged; kept: those that were accepted
    """

    ids: list[int]
    passes: int
    judged: int
    kept: int
    expected: float


@torch.no_grad()
def speculate(
    large,
    small,
    prompt_large: Sequence[int],
    prompt_small: Sequence[int],
    *,
    ahead: int = 4,
    end: int,
    seed: int = 0,
    max_new_tokens: int = 64,
) -> Spoken:
    """One answer at temperature 1, exactly distributed as the large model's.

    ahead: tokens drafted at a time. The whole prefix is read anew in each pass (no
    cache), so that there is nothing to roll back.

    Raises ArgumentError where nothing is drafted.
    """
    if ahead < 1:
        raise ArgumentError(f"ahead={ahead}", "draft 1 token or more")
    rng = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    passes = judged = kept = 0
    expected = 0.0
    while len(ids) < max_new_tokens and end not in ids:
        drafted, rows = [], []
        for _ in range(ahead):
            rows.append(_next(small, [*prompt_small, *ids, *drafted], 1)[0])
            u = torch.rand((), generator=rng, dtype=torch.float64)
            drafted.append(_drawn(rows[-1], u))
            if drafted[-1] == end:
                break
        q = torch.stack(rows)
        k = len(drafted)
        p = _next(large, [*prompt_large, *ids, *drafted], k + 1)
        u = torch.rand(k + 1, generator=rng, dtype=torch.float64)
        said = verify(p, q, drafted, u)
        passes += 1
        seen = min(len(said), k)
        judged, kept = judged + seen, kept + len(said) - 1
        expected += overlap(p[:seen], q[:seen]).sum().item()
        ids += said
    if end in ids:
        ids = ids[: ids.index(end) + 1]
    return Spoken(ids[:max_new_tokens], passes, judged, kept, expected)


def _next(model, ids: Sequence[int], n: int) -> Float[Tensor, "n v"]:
    """Distributions of the token after each of the last n prefixes."""
    logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, -n:]
    return logits.double().softmax(-1)
