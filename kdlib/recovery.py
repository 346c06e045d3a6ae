"""How much of its context has a student taken in?

    gain      E KL( p_t(. | c, z) || p_t(. | c', z) )   the teacher left without c
    floor     E KL( p_t(. | c, z) || p*(. | c', z) )    the best student that sees x'
    kl        E KL( p_t(. | c, z) || p_s(. | c', z) )   this student
    recovery  1 - (kl - floor) / (gain - floor)         0: nothing, 1: all there is

The student cannot tell contexts apart that leave the same x' = (c', z). The best it can
do is their mixture, weighted by how well each explains the response so far,

    p*(y_i | x', y_<i) ~ sum_c Pr(c) Pr_t(y_<i | c, z) p_t(y_i | c, z, y_<i)

and by the chain rule what then remains is I(Y; C | X'), whatever the student's size
(exact.py sums it over all sequences; the tests compare). All four numbers are per
response token, on responses that the teacher wrote with its context.

Knows models and their inputs. Does not know how the student was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kdlib.divergences import forward_kl, tempered_log_softmax
from kdlib.errors import ArgumentError, DataError
from kdlib.evaluate import response_logits
from kdlib.ledger import Interval, ratio_interval
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.sampling import complete

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


@dataclass(frozen=True)
class Recovery:
    """In nats per response token, each with its 95 % interval over the user inputs.

    floor:       exact for these contexts and prior, but for sampling. If they are a
                 sample of more contexts, it is too low on average: K contexts hold at
                 most log K nats
    floor_above: the mixture without the response's own context. If the contexts are a
                 sample, it is too high on average, so the truth lies between the two
                 (Poole et al. 2019, arXiv 1905.06922, section 2). None for one
                 context
    kl, recovery: None without a student; recovery also where gain - floor is not clear
                 of zero: there is nothing to take in
    """

    gain: Interval
    floor: Interval
    floor_above: Interval | None
    kl: Interval | None
    recovery: Interval | None


@torch.no_grad()
def measure_recovery(
    teacher,
    collator: PairCollator,
    user_inputs: Sequence[str],
    contexts: Sequence[str],
    *,
    student=None,
    simplified: str = "",
    prior: Sequence[float] | None = None,
    draws: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> Recovery:
    """Gain, floor and, for a student, recovery, where every context leaves the same c'.

    teacher, student: causal LMs with the collator's tokenizer
    contexts:   all that can stand before a user input, or a sample of them
    simplified: c', which the student reads in place of any of them
    prior:      Pr(c), by default equal for all
    draws:      responses for each user input and context, from the teacher at
                temperature 1, cut at max_new_tokens; a cut one counts as far as it goes
    seed:       of the draws

    Costs len(user_inputs) x contexts^2 x draws forward passes of the teacher.

    Raises ArgumentError for fewer than two user inputs, no context, or a prior that is
    none; DataError where a prompt finds no room in the collator's budget.
    """
    log_prior = _log_prior(contexts, prior)
    if len(user_inputs) < 2 or draws < 1:
        raise ArgumentError(
            f"{len(user_inputs)} user inputs, draws={draws}",
            "give two user inputs at least, for an interval, and one draw",
        )
    sums = []
    for number, user_input in enumerate(user_inputs):
        prompts = _prompts(collator, user_input, contexts, simplified, max_new_tokens)
        responses = complete(
            teacher,
            collator.tokenizer,
            [prompt for prompt in prompts[:-1] for _ in range(draws)],
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            seeds=[f"{seed} {number} {i}" for i in range(draws * len(contexts))],
            keep_end=True,
        )
        total = torch.zeros(5, dtype=torch.float64)
        for i, response in enumerate(responses):
            own = i // draws
            kls = _of_response(
                teacher, student, collator, prompts, response, own, log_prior
            )
            total += log_prior[own].exp() / draws * kls.sum(-1)
        sums.append(total.tolist())
    tokens, gain, floor, above, kl = zip(*sums, strict=True)
    known = student is not None
    return Recovery(
        gain=ratio_interval(gain, tokens),
        floor=ratio_interval(floor, tokens),
        floor_above=ratio_interval(above, tokens) if len(contexts) > 1 else None,
        kl=ratio_interval(kl, tokens) if known else None,
        recovery=_recovery(gain, floor, kl) if known else None,
    )


def _prompts(collator, user_input, contexts, simplified, room) -> list[list[int]]:
    """The teacher's for every context, and x' as the last one."""
    texts = [(collator.teacher_side, context) for context in contexts]
    prompts = []
    for side, context in [*texts, (collator.student_side, simplified)]:
        ids, cut = side.prompt_ids(context, user_input, room, 0)
        if cut:
            raise DataError(
                f"{cut} tokens of a context find no room on the {side.name}'s side",
                f"raise {side.name}_max_length: a context cut short is another one",
            )
        prompts.append(ids)
    return prompts


def _of_response(teacher, student, collator, prompts, response, own, log_prior):
    """[5, L]: ones, and the gain, floor, floor_above and kl of each token."""
    *full, short = prompts
    batch = collator.collate(
        [EncodedPair(j, ids, short, response) for j, ids in enumerate(full)]
    )
    shape = len(full), len(response)
    logits = response_logits(teacher, batch, "teacher").unflatten(0, shape)
    logits = logits.cpu().double()
    alone = collator.collate([EncodedPair(0, full[own], short, response)])
    left = response_logits(teacher, alone, "student").cpu().double()
    log_p = tempered_log_softmax(logits, 1.0)
    ids = torch.tensor(response)
    floor = forward_kl(best_student(log_p, ids, log_prior), logits[own])
    above = kl = torch.zeros_like(floor)
    if len(full) > 1:
        others = log_prior.clone()
        others[own] = -torch.inf
        above = forward_kl(best_student(log_p, ids, others), logits[own])
    if student is not None:
        seen = response_logits(student, alone, "student").cpu().double()
        kl = forward_kl(seen, logits[own])
    gain = forward_kl(left, logits[own])
    return torch.stack([torch.ones_like(floor), gain, floor, above, kl])


def best_student(
    log_p: Float[Tensor, "C L V"],
    response: Int64[Tensor, " L"],
    log_prior: Float[Tensor, " C"],
) -> Float[Tensor, "L V"]:
    """log p*(. | x', y_<i): the contexts' mixture after each part of a response.

    log_p:     log p_t(. | c, z, y_<i) for every context
    log_prior: log Pr(c), not necessarily normalised; -inf leaves a context out
    """
    likelihood = log_p.gather(-1, response.expand(len(log_p), -1)[..., None])[..., 0]
    before = likelihood.cumsum(-1) - likelihood  # log Pr_t(y_<i | c, z)
    posterior = (log_prior[:, None] + before).log_softmax(0)
    return (posterior[..., None] + log_p).logsumexp(0)


def _recovery(gain, floor, kl) -> Interval | None:
    left = [g - f for g, f in zip(gain, floor, strict=True)]
    if ratio_interval(left, [1.0] * len(left)).low <= 0:
        return None
    taken = [g - k for g, k in zip(gain, kl, strict=True)]
    return ratio_interval(taken, left)


def _log_prior(contexts, prior) -> Float[Tensor, " C"]:
    prior = [1 / max(1, len(contexts))] * len(contexts) if prior is None else prior
    prior = torch.as_tensor(prior, dtype=torch.float64)
    if not len(contexts) or len(prior) != len(contexts):
        raise ArgumentError(
            f"{len(contexts)} contexts, {len(prior)} prior probabilities",
            "give one context at least, and a probability for each",
        )
    if (prior <= 0).any() or abs(float(prior.sum()) - 1) > 1e-9:
        raise ArgumentError(
            f"prior = {prior.tolist()}", "give positive probabilities with the sum 1"
        )
    return prior.log()
