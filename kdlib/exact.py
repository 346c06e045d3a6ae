"""Language models so small that every sequence can be listed: truth by summation.

With a vocabulary of V = 8 and length L = 4 there are 8^4 = 4096 sequences. Textbooks
call the sum over all sequences infeasible; here it is a line. So sequence-level
divergences, the on-policy gradient, the context floor, and the mean and variance of
every Monte Carlo estimator are exact numbers, and everything that samples can be held
to them.

Knows: probabilities over whole sequences. Does not know tokenizers or neural networks.

A conditional model Pr(y | c) is L tables of logits. Table t has the shape
[C, V^t, V]: for each context c and each prefix y_1 .. y_t, the logits of the next
token. Prefixes and sequences are numbered in lexicographic order (base V, first token
most significant), so appending a token to all prefixes is a reshape:

    log Pr(y_1 .. y_t+1 | c) = log Pr(y_1 .. y_t | c) + log Pr(y_t+1 | c, y_1 .. y_t)
        [C, V^(t+1)]         =      [C, V^t, 1]       +         [C, V^t, V]

All of it in float64. Every probability is positive: -inf is refused, because 0 log 0
would be NaN in a plain sum. Values are in nats and have the shape [C], one for each
context.

Notation: Xiao & Zhu, Foundations of Large Language Models, ch. 3 (arXiv 2501.09223).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.divergences import forward_kl
from kdlib.errors import ArgumentError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    ByContext = Float[Tensor, "c"]
    Joint = Float[Tensor, "c n"]  # n = V^L sequences


class ExactLM:
    """A conditional language model, written out in full.

    tables: L tensors of logits, table t of shape [C, V^t, V]. They may require grad,
            or be computed from a smaller parameter (see `memoryless`)

    Raises ArgumentError where a table has another shape than its place asks for, or a
    logit that is not finite.
    """

    def __init__(self, tables: Sequence[Float[Tensor, "c prefixes v"]]):
        self.tables = list(tables)
        contexts, _, vocab = self.tables[0].shape
        for t, table in enumerate(self.tables):
            if table.shape != (contexts, vocab**t, vocab):
                raise ArgumentError(
                    f"table {t} has the shape {list(table.shape)}",
                    f"give [C, V^t, V] = {[contexts, vocab**t, vocab]}",
                )
            if not table.isfinite().all():
                raise ArgumentError(
                    f"table {t} has a logit that is not finite",
                    "give what is impossible a low logit, such as -50",
                )
        self.contexts, self.vocab, self.length = contexts, vocab, len(self.tables)

    @classmethod
    def random(cls, vocab=8, length=4, contexts=1, *, scale=1.0, seed=0) -> ExactLM:
        """Logits from a normal distribution; `scale` makes it more or less certain."""
        rng = torch.Generator().manual_seed(seed)
        shapes = [(contexts, vocab**t, vocab) for t in range(length)]
        return cls(
            [scale * torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
        )

    @classmethod
    def from_joint(cls, log_joint: Joint, vocab: int) -> ExactLM:
        """The model with these (unnormalised) log-probabilities of whole sequences.

        Every distribution over sequences has such tables: the chain rule. The logit of
        a token is the log of the sum over all that can follow it.
        """
        if vocab ** round(math.log(log_joint.shape[1], vocab)) != log_joint.shape[1]:
            raise ArgumentError(
                f"log_joint {list(log_joint.shape)} with vocab = {vocab}",
                "give [C, V^L], one number for each sequence",
            )
        tables, prefixes = [], log_joint
        while prefixes.shape[1] > 1:
            tables.append(prefixes.unflatten(1, (-1, vocab)))
            prefixes = tables[-1].logsumexp(-1)
        return cls(tables[::-1])

    @classmethod
    def from_modes(
        cls, modes: Sequence[Sequence[int]], weights=None, *, vocab=8, noise=0.1
    ) -> ExactLM:
        """A teacher that means one of several sequences and slips now and then.

        Pr(y) = sum_m w_m prod_t ((1 - noise) [y_t = m_t] + noise / V). Two modes and a
        student that can hold one show what each direction of KL prefers.
        """
        modes = torch.tensor(modes)
        if weights is None:
            weights = [1 / len(modes)] * len(modes)
        weights = torch.tensor(weights, dtype=torch.float64)
        hit = sequences(vocab, modes.shape[1])[:, None] == modes  # [V^L, M, L]
        token = (1 - noise) * hit.double() + noise / vocab
        return cls.from_joint((token.prod(-1) @ weights).log()[None], vocab)

    @classmethod
    def memoryless(cls, logits: Float[Tensor, "c l v"]) -> ExactLM:
        """A student without memory: each position has one distribution, no prefix.

        The tables are views of `logits`, so gradients arrive there, summed.
        """
        contexts, length, vocab = logits.shape
        return cls(
            [logits[:, t : t + 1].expand(-1, vocab**t, -1) for t in range(length)]
        )

    def log_probs(self, length: int | None = None) -> Joint:
        """log Pr(y_1 .. y_length | c) of every prefix [C, V^length]; L if None."""
        total = self.tables[0].new_zeros(self.contexts, 1)
        for table in self.tables[:length]:
            total = (total.unsqueeze(-1) + table.log_softmax(-1)).flatten(1)
        return total

    def leaves(self) -> ExactLM:
        """The same numbers, as tensors of their own that require grad."""
        return ExactLM(
            [table.detach().clone().requires_grad_() for table in self.tables]
        )


def sequences(vocab: int, length: int) -> Int[Tensor, "n l"]:
    """All sequences [V^L, L], in the order in which the tables number them."""
    return torch.cartesian_prod(*[torch.arange(vocab)] * length).view(-1, length)


def _check_comparable(first, second) -> None:
    kinds = [(model.vocab, model.length) for model in (first, second)]
    contexts = {first.contexts, second.contexts}
    if kinds[0] != kinds[1] or len(contexts - {1}) > 1:
        raise ArgumentError(
            f"models of (V, L) = {kinds[0]} and {kinds[1]}, with {first.contexts} and "
            f"{second.contexts} contexts",
            "give both the same V and L, and as many contexts, or one of them just 1",
        )


# --- sequence-level quantities -------------------------------------------------------


def sequence_forward_kl(teacher: ExactLM, student: ExactLM) -> ByContext:
    """KL(p_t || p_s) = sum_y Pr_t(y | c) (log Pr_t(y | c) - log Pr_s(y | c')).

    c' is c, or a student of one context stands beside each of the teacher's.

    Raises ArgumentError where the two are not about the same sequences and contexts.
    """
    _check_comparable(teacher, student)
    log_pt, log_ps = teacher.log_probs(), student.log_probs()
    return (log_pt.exp() * (log_pt - log_ps)).sum(-1)


def sequence_reverse_kl(teacher: ExactLM, student: ExactLM) -> ByContext:
    """KL(p_s || p_t): the on-policy objective, a sum over the student's sequences."""
    return sequence_forward_kl(student, teacher)


def sequence_entropy(model: ExactLM) -> ByContext:
    """-sum_y Pr(y) log Pr(y)."""
    log_p = model.log_probs()
    return -(log_p.exp() * log_p).sum(-1)


def token_level(
    teacher: ExactLM,
    student: ExactLM,
    *,
    prefixes_from: ExactLM,
    divergence: Callable = forward_kl,
) -> Float[Tensor, "l c"]:
    """Expected per-token divergence at each position [L, C]; sum(0) for the sequence.

        sum over prefixes h of length t of  Pr(h | c) D(Pr_t(. | h), Pr_s(. | h))

    What training on text measures: the divergence of next-token distributions, with
    prefixes from the data. Chain rule: with the teacher's prefixes and forward_kl the
    sum IS the sequence-level forward KL, with the student's prefixes and reverse_kl the
    sequence-level reverse KL. The two mixed cases are others: forward_kl on the
    student's prefixes is exposure bias, and GKD's on-policy loss (arXiv 2306.13649).

    divergence: any function of divergences.py, (student_logits, teacher_logits)

    Raises ArgumentError where the models are not about the same sequences and contexts.
    """
    _check_comparable(teacher, student)
    _check_comparable(teacher, prefixes_from)
    positions = []
    for t, (t_logits, s_logits) in enumerate(
        zip(teacher.tables, student.tables, strict=True)
    ):
        per_prefix = divergence(*torch.broadcast_tensors(s_logits, t_logits))
        positions.append((prefixes_from.log_probs(t).exp() * per_prefix).sum(-1))
    return torch.stack(positions)


def on_policy_gradient(teacher: ExactLM, student: ExactLM) -> list[Tensor]:
    """Exact gradient of the sequence-level reverse KL, summed over contexts.

    With respect to each of the student's tables. No sample is drawn: it is what a
    policy gradient estimates,

        sum_y Pr_s(y) (log Pr_s(y) - log Pr_t(y)) grad log Pr_s(y).

    Source: Gu et al. 2023, MiniLLM (arXiv 2306.08543), section 2.2, as a full sum.
    """
    student = student.leaves()
    loss = sequence_reverse_kl(teacher, student).sum()
    return list(torch.autograd.grad(loss, student.tables))


# --- Monte Carlo, judged -------------------------------------------------------------


class Moments(NamedTuple):
    """What an estimator does on average, over all sequences that the student can draw.

    mean, variance:    [C] of its value
    gradient:          the mean gradient of its value, a tensor for each table
    gradient_variance: [C] variance of one sample's gradient, summed over all logits
    """

    mean: ByContext
    variance: ByContext
    gradient: list[Tensor]
    gradient_variance: ByContext


def estimator_moments(
    estimator: Callable[[Joint, Joint], Joint], teacher: ExactLM, student: ExactLM
) -> Moments:
    """Mean and variance of estimator(log Pr_s(y), log Pr_t(y)) for y ~ student.

    estimator: elementwise, like k1, k2, k3 and the score function (estimators.py)

    By back-propagation y is a constant: a sample's gradient is w(y) grad log Pr_s(y)
    with w the estimator's derivative by its first argument. Its square needs no
    4096 gradients, because the score of a softmax is one-hot minus probabilities.
    """
    _check_comparable(teacher, student)
    if teacher.contexts != student.contexts:
        raise ArgumentError(
            f"{teacher.contexts} teacher contexts, {student.contexts} of the student",
            "give both as many contexts, so that each sample has one teacher",
        )
    student = student.leaves()
    log_ps, log_pt = student.log_probs(), teacher.log_probs().detach()
    ps = log_ps.detach().exp()
    leaf = log_ps.detach().requires_grad_()
    value = estimator(leaf, log_pt) + 0.0 * leaf  # a detached one has gradient 0
    (weight,) = torch.autograd.grad(value.sum(), leaf)
    value = value.detach()
    mean = (ps * value).sum(-1)
    gradient = torch.autograd.grad((ps * weight * log_ps).sum(), student.tables)
    mean_square = (ps * weight.square() * _squared_score(student)).sum(-1)
    return Moments(
        mean=mean,
        variance=(ps * (value - mean[:, None]).square()).sum(-1),
        gradient=list(gradient),
        gradient_variance=mean_square - sum(g.square().sum((1, 2)) for g in gradient),
    )


def _squared_score(model: ExactLM) -> Joint:
    """||grad log Pr(y)||^2 by the logits met on the way: sum_t |one-hot(y_t) - p|^2."""
    total = model.tables[0].new_zeros(model.contexts, 1)
    for table in model.tables:
        p = table.detach().softmax(-1)
        norm = 1 - 2 * p + p.square().sum(-1, keepdim=True)
        total = (total.unsqueeze(-1) + norm).flatten(1)
    return total


# --- what a context is worth ---------------------------------------------------------


def context_floor(
    teacher: ExactLM,
    prior: Sequence[float] | None = None,
    simplified: Sequence[int] | None = None,
) -> tuple[Tensor, ExactLM]:
    """The least forward KL of any student that sees x' instead of c, and that student.

        min_q E_c KL(Pr_t(. | c) || q(. | x'))  =  I(Y; C | X')

    reached by the mixture q(y | x') = sum_c Pr(c | x') Pr_t(y | c). A plateau at this
    number is arithmetic; above it, something is left to learn or broken. Where every
    context keeps its own x', or all contexts say the same, it is 0.

    prior:      [C] probabilities of the contexts; uniform by default
    simplified: [C] the number of the x' that is left of each context; by default all
                have the same: nothing is left
    Returns the floor and the mixture, a model with one context for each x', in the
    order of their numbers.

    Source: Cover & Thomas, Elements of Information Theory, 2nd ed., section 13.1, where
    it is the redundancy of the best single code for several sources.

    Raises ArgumentError where prior and simplified are not about these contexts, or the
    prior is none.
    """
    members, log_weights = _groups(teacher, prior, simplified)
    log_joint = teacher.log_probs()
    mixture = [
        (log_joint[m] + w.log_softmax(0)[:, None]).logsumexp(0)
        for m, w in zip(members, log_weights, strict=True)
    ]
    floor = sum(
        w.exp() @ (log_joint[m].exp() * (log_joint[m] - mix)).sum(-1)
        for m, w, mix in zip(members, log_weights, mixture, strict=True)
    )
    return floor, ExactLM.from_joint(torch.stack(mixture), teacher.vocab)


def reverse_context_floor(
    teacher: ExactLM,
    prior: Sequence[float] | None = None,
    simplified: Sequence[int] | None = None,
) -> tuple[Tensor, ExactLM]:
    """The same for reverse KL, min_q E_c KL(q(. | x') || Pr_t(. | c)).

    The best student is the product of experts, q(y | x') proportional to
    prod_c Pr_t(y | c)^Pr(c | x'): it says only what no context rules out. The floor is
    minus the log of the product's sum over y.
    """
    members, log_weights = _groups(teacher, prior, simplified)
    log_joint = teacher.log_probs()
    product = torch.stack(
        [w.softmax(0) @ log_joint[m] for m, w in zip(members, log_weights, strict=True)]
    )
    mass = torch.stack([w.exp().sum() for w in log_weights])
    floor = -(mass * product.logsumexp(-1)).sum()
    return floor, ExactLM.from_joint(product, teacher.vocab)


def _groups(teacher, prior, simplified) -> tuple[list[Tensor], list[Tensor]]:
    """Members and log prior of each group of contexts that the student cannot tell."""
    prior = [1 / teacher.contexts] * teacher.contexts if prior is None else prior
    simplified = [0] * teacher.contexts if simplified is None else simplified
    prior = torch.as_tensor(prior, dtype=torch.float64)
    simplified = torch.as_tensor(simplified)
    if prior.shape != simplified.shape or len(prior) != teacher.contexts:
        raise ArgumentError(
            f"prior {list(prior.shape)}, simplified {list(simplified.shape)}",
            f"give one number for each of the teacher's {teacher.contexts} contexts",
        )
    if (prior <= 0).any() or abs(float(prior.sum()) - 1) > 1e-9:
        raise ArgumentError(
            f"prior = {prior.tolist()}", "give positive probabilities with the sum 1"
        )
    members = [torch.nonzero(simplified == x)[:, 0] for x in simplified.unique()]
    return members, [prior[m].log() for m in members]
