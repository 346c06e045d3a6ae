"""Wrong losses and right ones: what the laws are held to.

Each wrong loss is a real or likely mistake in a loss that is right otherwise, with its
provenance and the verdicts that it must get: {law: part of the bug's name}. "CEU n" is
row n of the thirteen bugs of a distillation lab, "museum n" a row of the course's table
of failures in libraries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kdlib.loss_under_test import FUSED_OPTIONS, OPTIONS, LossUnderTest


@dataclass(frozen=True)
class Wrong:
    loss: LossUnderTest
    provenance: str
    caught: dict[str, str]


@dataclass
class Parts:
    """A right loss in pieces, so that a mistake can be made in each one of them."""

    shift: bool = True
    mask: object = staticmethod(lambda labels: labels != -100)
    soft: object = staticmethod(
        lambda s, t: F.kl_div(
            s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
    )
    prepare: object = staticmethod(lambda s, t: (s, t))
    student_t: object = staticmethod(lambda t: t)
    teacher_t: object = staticmethod(lambda t: t)
    hard_t: object = staticmethod(lambda t: 1.0)
    scale: object = staticmethod(lambda t: t**2)
    hard_scale: object = staticmethod(lambda t: 1.0)
    weights: object = staticmethod(lambda w: (1 - w, w))
    mean: object = staticmethod(
        lambda x, mask, n: (x * mask).sum() / (mask.sum() if n is None else n)
    )
    half: bool = False

    def __call__(
        self,
        student,
        teacher,
        labels,
        *,
        temperature=1.0,
        hard_weight=0.0,
        num_items=None,
    ):
        student, teacher = self.prepare(student, teacher)
        if self.shift:
            student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        if not self.half:
            student, teacher = (
                x.to(torch.promote_types(x.dtype, torch.float32))
                for x in (student, teacher)
            )
        mask = self.mask(labels)
        soft = self.soft(
            student / self.student_t(temperature), teacher / self.teacher_t(temperature)
        )
        target = labels.clamp_min(0).unsqueeze(-1)
        hard = -(student / self.hard_t(temperature)).log_softmax(-1).gather(-1, target)
        weights = self.weights(hard_weight)
        per_token = weights[0] * self.scale(temperature) * soft
        per_token = per_token + weights[1] * self.hard_scale(temperature) * hard[..., 0]
        return self.mean(per_token, mask, num_items)


def declare(name, fn, **declared):
    declared = {"scale_by_t2": True, "options": OPTIONS, **declared}
    return LossUnderTest(name, fn, **declared)


WRONG: list[Wrong] = []


def wrong(name, provenance, caught, fn=None, **declared):
    loss = declare(name, fn, **declared) if fn else LossUnderTest(name, **declared)
    WRONG.append(Wrong(loss, provenance, caught))


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixed_jsd(s, t, on_teacher, beta=0.3):
    log_ps, log_pt = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(
        log_pt + math.log(on_teacher), log_ps + math.log(1 - on_teacher)
    )
    return beta * kl(log_pt, log_m) + (1 - beta) * kl(log_ps, log_m)


# --- the thirteen bugs of the lab -----------------------------------------------------

wrong(
    "softmax in the place of log_softmax",
    "CEU 1, ProDA#20",
    {
        "i1": "probabilities in the place of log-probabilities",
        "1": "not at the minimum",
    },
    Parts(soft=lambda s, t: -(t.softmax(-1) * s.softmax(-1)).sum(-1)),
)
wrong(
    "no T^2",
    "CEU 2, knowledge-distillation-keras#2",
    {"i1": "T^2 is missing", "11": "T^2 is missing"},
    Parts(scale=lambda t: 1.0),
)
wrong(
    "T for T^2",
    "CEU 3",
    {"i1": "T in place of T^2", "11": "T in place of T^2"},
    Parts(scale=lambda t: t),
)
wrong(
    "hard_weight swapped",
    "CEU 4",
    {"i2": "hard_weight is swapped", "1": "hard labels in the soft loss"},
    Parts(weights=lambda w: (w, 1 - w)),
)
wrong(
    "reduction mean",
    "CEU 5, haitongli#2, museum 6",
    {"7": "mean over the vocabulary", "i1": "mean over the vocabulary"},
    Parts(
        soft=lambda s, t: F.kl_div(
            s.log_softmax(-1), t.softmax(-1), reduction="none"
        ).mean(-1)
    ),
)
wrong(
    "mask ignored",
    "CEU 6, MambaInLlama#11, museum 4",
    {
        "3": "padding or prompt in the loss",
        "4": "masked logits",
        "i1": "padding or prompt",
    },
    Parts(mask=torch.ones_like),
)
wrong(
    "mean of the rows' means",
    "CEU 7, torchtune#1865",
    {"5": "sequence means averaged", "i1": "sequence means are averaged"},
    Parts(
        mean=lambda x, mask, n: ((x * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()
    ),
    options=OPTIONS - {"num_items"},
)
wrong(
    "KL the other way round",
    "CEU 8, aprender#2153, museum 12",
    {"2": "direction of the divergence is swapped", "i1": "direction"},
    Parts(soft=lambda s, t: kl(s.log_softmax(-1), t.log_softmax(-1))),
)
wrong(
    "only the teacher softened",
    "CEU 9",
    {"i1": "only the teacher is softened", "i3": "only one side is softened"},
    Parts(student_t=lambda t: 1.0),
)
wrong(
    "the teacher on both sides",
    "CEU 10, labml#66",
    {"i1": "teacher's logits on both sides", "3": "no gradient", "15": "never used"},
    Parts(prepare=lambda s, t: (s, t), soft=lambda s, t: kl(*2 * [t.log_softmax(-1)])),
    options=OPTIONS - {"hard_weight"},
)
wrong(
    "cross-entropy at T as well",
    "CEU 11",
    {"i2": "cross-entropy is softened as well"},
    Parts(hard_t=lambda t: t),
)
wrong(
    "shifted by one",
    "CEU 12, DistillKit HEAD, museum 1",
    {"3": "label shift off by one (museum 1)", "i1": "label shift off by one"},
    Parts(shift=False),
)
wrong(
    "entropy not subtracted",
    "CEU 13, the PyTorch tutorial",
    {"1": "cross-entropy reported as KL", "i3": "cross-entropy reported as KL"},
    Parts(soft=lambda s, t: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)),
)
CEU = len(WRONG)

# --- the museum -----------------------------------------------------------------------


def drop_last(labels):
    mask = labels != -100
    return mask & mask.cumsum(1).ne(mask.sum(1, keepdim=True))


wrong(
    "logits at the answer's positions, without its end",
    "museum 2, TRL GOLD",
    {"3": "without the end token", "i1": "without the end token"},
    Parts(shift=False, mask=drop_last),
)
wrong(
    "neither mask nor shift",
    "museum 3, Soup#682",
    {"3": "padding or prompt in the loss"},
    Parts(shift=False, mask=torch.ones_like),
)
wrong(
    "all positions in the denominator",
    "museum 4",
    {"4": "padding dilutes the mean", "i1": "padding counts in the mean"},
    Parts(mean=lambda x, mask, n: (x * mask).sum() / mask.numel()),
    options=OPTIONS - {"num_items"},
)
wrong(
    "ignore_index taken for token 0",
    "museum 5",
    {"3": "supervised tokens are left out"},
    Parts(mask=lambda labels: labels > 0),
)
wrong(
    "divided by tokens times V",
    "museum 7, trl#4105",
    {"7": "mean over the vocabulary"},
    Parts(
        soft=lambda s, t: kl(t.log_softmax(-1), s.log_softmax(-1)) / s.shape[-1],
    ),
)
wrong(
    "micro-batch means averaged",
    "museum 8, trl#4719, swift#10165",
    {"5": "micro-batch means"},
    Parts(),
    accumulate=lambda parts: sum(Parts()(*part) for part in parts) / len(parts),
)
wrong(
    "num_items taken and not used",
    "museum 8, trl#6006, Soup#720",
    {"5": "micro-batch means"},
    Parts(mean=lambda x, mask, n: (x * mask).sum() / mask.sum()),
)
wrong(
    "num_items of one process for two",
    "museum 8",
    {"5": "2 times the batch"},
    Parts(mean=lambda x, mask, n: (x * mask).sum() / (n / 2 if n else mask.sum())),
)
wrong(
    "divided by the labels of the data set",
    "museum 9, TRL GKD on-policy",
    {"i1": "times what it should be"},
    Parts(mean=lambda x, mask, n: (x * mask).sum() / 20),
    options=OPTIONS - {"num_items"},
)


def jsd_knob(swap):
    def fn(student, teacher, labels, *, beta=0.5, **options):
        beta = 1 - beta if swap else beta
        if beta in (0, 1):
            soft = [Parts().soft, lambda s, t: Parts().soft(t, s)][int(beta)]
        else:
            soft = lambda s, t: mixed_jsd(s, t, beta, beta)  # noqa: E731
        return Parts(soft=soft)(student, teacher, labels, **options)

    return {
        "fn": fn,
        "divergence": "generalized_jsd",
        "params": {"beta": 0.5},
        "knob": ("beta", "forward_kl", "reverse_kl"),
    }


wrong(
    "generalised JSD sold as a knob of direction",
    "museum 11, swift#10078",
    {"10": "no knob of direction"},
    **jsd_knob(swap=False),
)
wrong(
    "beta's ends swapped",
    "museum 12",
    {"10": "ends of beta are swapped"},
    **jsd_knob(swap=True),
)
wrong(
    "JSD's mixture has its weights swapped",
    "own",
    {"2": "another divergence", "i1": "not the gradient"},
    Parts(soft=lambda s, t: mixed_jsd(s, t, on_teacher=0.7)),
    divergence="generalized_jsd",
    params={"beta": 0.3},
)
wrong(
    "k1 back-propagated",
    "museum 13",
    {"9": "gradient is zero, like that of k1"},
    estimator=lambda s, t: s - t,
)
wrong(
    "k3 back-propagated on-policy",
    "museum 13, torchrl#4038",
    {"9": "FORWARD KL, like k3's"},
    estimator=lambda s, t: (t - s).exp() - 1 - (t - s),
)
wrong(
    "absolute log-ratio back-propagated",
    "own",
    {"9": "not that of reverse KL"},
    estimator=lambda s, t: (s - t).abs(),
)
wrong(
    "advantage not detached",
    "museum 25, TRL MiniLLM",
    {"9": "un-detached advantage"},
    # the importance ratio is 1; differentiated with the advantage still attached
    estimator=lambda s, t: (s - s.detach()).exp() * (s - t) + 0.5 * (s - s.detach()),
)


def on_support(support, combine):
    def fn(student, teacher, k):
        ids = (teacher if support == "teacher" else student).topk(k).indices
        log_ps, log_pt = (x.log_softmax(-1).gather(-1, ids) for x in (student, teacher))
        return combine(log_ps, log_pt)

    return fn


wrong(
    "top-k renormalised on the teacher's support",
    "museum 14, swift, ModelOpt, axolotl",
    {"8": "mass that the student puts in the tail"},
    top_k=on_support("teacher", lambda s, t: kl(t.log_softmax(-1), s.log_softmax(-1))),
)
wrong(
    "top-k on the student's support",
    "museum 15, TRL SDFT",
    {"8": "a mode that the student lacks"},
    top_k=on_support(
        "student", lambda s, t: kl(t.log_softmax(-1), s.log_softmax(-1)).clamp_min(0)
    ),
)
wrong(
    "top-k cut off and clamped at zero",
    "museum 16, verl#7856",
    {"8": "negative, or clamped to nothing"},
    top_k=on_support("teacher", lambda s, t: kl(t, s).clamp_min(0)),
)
wrong(
    "top-k cut off",
    "museum 16",
    {"8": "negative, or clamped to nothing"},
    top_k=on_support("teacher", lambda s, t: kl(t, s)),
)
wrong(
    "top-k of reverse KL without a tail",
    "museum 17, verl#5041",
    {"8": "museum 1"},
    top_k=on_support("teacher", lambda s, t: kl(s, t)),
    divergence="reverse_kl",
)
wrong(
    "top-k that keeps one token less at k = V",
    "own",
    {"8": "not the dense loss at k = V"},
    top_k=lambda s, t, k: on_support(
        "teacher", lambda a, b: kl(b.log_softmax(-1), a.log_softmax(-1))
    )(s, t, k - 1),
)


def bucket(log_p, least=1e-12):
    rest = -torch.expm1(log_p.logsumexp(-1, keepdim=True))
    return torch.cat([log_p, rest.clamp_min(least).log()], dim=-1)


wrong(
    "top-k with an offset that keeps it positive",
    "own",
    {"8": "minimum is not at p = q"},
    # cut off, plus the student's missing mass: positive, and still drawn to the top k
    top_k=on_support(
        "teacher",
        lambda s, t: kl(bucket(t), bucket(s)) + 0.002 * (1 - s.exp().sum(-1)),
    ),
)
wrong(
    "top-k that is drawn into the tail",
    "own",
    {"8": "minimum is not at p = q"},
    top_k=on_support(
        "teacher", lambda s, t: kl(bucket(t), bucket(s)) + 0.01 * (s.exp().sum(-1) - 1)
    ),
)
wrong(
    "top-k with a bucket that is never empty",
    "own",
    {"8": "not the dense loss at k = V"},
    top_k=on_support("teacher", lambda s, t: kl(bucket(t, 1e-6), bucket(s))),
)
wrong(
    "log-probabilities clamped at -10",
    "museum 18, verl's dataclass default",
    {"i1": "no gradient where the student is most wrong"},
    Parts(soft=lambda s, t: kl(t.log_softmax(-1), s.log_softmax(-1).clamp_min(-10))),
)


def pad_student(filling):
    def prepare(s, t):
        tail = t[..., s.shape[-1] :]
        if filling != "copy":
            tail = torch.full_like(tail, filling)
        return torch.cat([s, tail], -1), t

    return prepare


wrong(
    "student padded with logit 0",
    "museum 19, Liger",
    {"6": "padded vocabulary columns"},
    Parts(prepare=pad_student(0.0)),
    padded=True,
)
wrong(
    "student padded with logit -14",
    "museum 19",
    {"6": "padded vocabulary columns"},
    Parts(prepare=pad_student(-14.0)),
    padded=True,
)
wrong(
    "student padded with the teacher's logits",
    "museum 19, swift",
    {"6": "padded vocabulary columns"},
    Parts(prepare=pad_student("copy")),
    padded=True,
)
wrong(
    "hard labels always at one half",
    "museum 20, trl#5731",
    {"1": "hard labels in the soft loss"},
    Parts(weights=lambda w: (0.5, 0.5)),
)


def fused(soft_weight=1.0, use=FUSED_OPTIONS, cap_last=False):
    def fn(h, w, t_h, t_w, **options):
        options = {k: v for k, v in options.items() if k in use}
        logits = [
            options.get("logit_scale", 1.0) * a @ b.T for a, b in ((h, w), (t_h, t_w))
        ]
        temperature, cap = options.get("temperature", 1.0), options.get("softcap")
        before = temperature if cap_last else 1.0
        if cap:
            logits = [before * cap * torch.tanh(x / before / cap) for x in logits]
        s, t = ((x / temperature).log_softmax(-1) for x in logits)
        soft = kl(t, s).mean() * temperature**2
        return soft_weight * soft - (1 - soft_weight) * s[:, 0].mean()

    return fn


FUSED = {"scale_by_t2": True, "fused_options": FUSED_OPTIONS}
wrong(
    "fused: half of it is cross-entropy",
    "museum 20, trl#5731",
    {"13": "another objective"},
    fused=fused(0.5),
    **FUSED,
)
for missing in ("softcap", "logit_scale", "temperature"):
    wrong(
        f"fused: {missing} ignored",
        "museum 21, trl#6629",
        {"13": f"ignores or misuses {missing}"},
        fused=fused(use=FUSED_OPTIONS - {missing}),
        **FUSED,
    )
wrong(
    "fused: temperature before the soft cap",
    "own",
    {"13": "misuses temperature with softcap with logit_scale"},
    fused=fused(cap_last=True),
    **FUSED,
)
wrong(
    "temperature accepted and ignored",
    "museum 22, 36",
    {"i1": "temperature is ignored"},
    Parts(student_t=lambda t: 1.0, teacher_t=lambda t: 1.0, scale=lambda t: 1.0),
)
wrong(
    "T^2 that is not declared",
    "museum 22",
    {"i1": "T^2 where none is declared", "11": "T^2 not declared"},
    Parts(),
    scale_by_t2=False,
)
wrong(
    "only the student softened",
    "museum 22, sampling temperature",
    {"i1": "only the student is softened", "11": "only one side"},
    Parts(teacher_t=lambda t: 1.0),
)
wrong(
    "exp, then log",
    "museum 23, Liger#769",
    {"12": "underflowed", "7": "tokens of no probability give NaN"},
    Parts(
        soft=lambda s, t: (
            t.softmax(-1) * (t.softmax(-1).log() - s.softmax(-1).log())
        ).sum(-1)
    ),
)
wrong(
    "log_softmax in bfloat16",
    "museum 24, Liger",
    {"12": "log-probabilities in bfloat16"},
    Parts(half=True),
)


def count_rows(teacher_ids, teacher_labels, student_ids, student_labels):
    counts = [(x != -100).sum(1) for x in (teacher_labels, student_labels)]
    assert torch.equal(*counts)


def count_batch(teacher_ids, teacher_labels, student_ids, student_labels):
    assert (teacher_labels != -100).sum() == (student_labels != -100).sum()


wrong(
    "views compared by the batch's count",
    "museum 29, swift",
    {"14": "counted over the batch"},
    pair=count_batch,
)
wrong(
    "views compared by each row's count",
    "museum 29",
    {"14": "other tokens pass"},
    pair=count_rows,
)
wrong(
    "views compared as sets",
    "own",
    {"14": "another order passes"},
    pair=lambda t, tl, s, sl: torch.testing.assert_close(
        tl.sort(-1).values, sl.sort(-1).values
    ),
)
wrong("views not compared", "museum 28", {"14": "another number"}, pair=lambda *_: None)
wrong(
    "views that may not differ in their prompts",
    "own",
    {"14": "refuses equal responses"},
    pair=lambda t, tl, s, sl: torch.testing.assert_close(t, s),
)
wrong(
    "the teacher is asked and dropped",
    "museum 33, atropos#456",
    {"15": "never used", "i1": "not the gradient"},
    Parts(soft=lambda s, t: (s.softmax(-1) * s.log_softmax(-1)).sum(-1) + 2.4),
)
wrong(
    "the teacher moves the number alone",
    "own",
    {"15": "not the gradient", "3": "no gradient"},
    Parts(soft=lambda s, t: kl(t.log_softmax(-1), s.detach().log_softmax(-1))),
    options=OPTIONS - {"hard_weight"},
)
wrong(
    "the teacher's logits centred in place",
    "own",
    {"15": "changed in place"},
    Parts(prepare=lambda s, t: (s, t.sub_(t.amax(-1, keepdim=True)))),
)
wrong(
    "the teacher left in train mode",
    "courses, mismatch clinic",
    {"15": "train mode"},
    teacher=lambda module, ids: module(ids).logits.detach(),
)
wrong(
    "the teacher's answer is a constant",
    "museum 33",
    {"15": "never used"},
    teacher=lambda module, ids: torch.zeros(*ids.shape, 16),
)
wrong(
    "the teacher's targets carry a gradient",
    "own",
    {"15": "carry a gradient"},
    teacher=lambda module, ids: module.eval()(ids).logits,
)

# --- more of our own ------------------------------------------------------------------

wrong(
    "softmax without subtracting the maximum",
    "own",
    {"6": "overflows"},
    Parts(
        soft=lambda s, t: kl(*(x - x.exp().sum(-1, keepdim=True).log() for x in (t, s)))
    ),
)
wrong(
    "squared error of logits called KL",
    "own",
    {"6": "not normalised", "2": "another divergence"},
    Parts(soft=lambda s, t: (s - t).square().sum(-1)),
)
wrong(
    "prompts cut at the batch's longest",
    "own",
    {"3": "supervised tokens are left out"},
    Parts(
        mask=lambda labels: (
            (labels != -100)
            & (torch.arange(labels.shape[1]) >= (labels != -100).int().argmax(1).max())
        )
    ),
)
wrong(
    "a fixed prompt length",
    "own",
    {"3": "wrong positions", "4": "masked logits"},
    Parts(mask=lambda labels: (torch.arange(labels.shape[1]) >= 3).expand_as(labels)
          & (torch.arange(labels.shape[1]) < 6)),
)  # fmt: skip
wrong(
    "earlier rows weigh more",
    "own",
    {"4": "order of the rows", "i1": "not the gradient", "5": "do not add up"},
    Parts(
        mean=lambda x, mask, n: (
            (x * mask).sum(1) @ torch.linspace(1.2, 0.8, len(x), dtype=x.dtype)
        ) / (mask.sum() if n is None else n)
    ),
)  # fmt: skip
wrong(
    "a row without response gives NaN",
    "own",
    {"4": "a row without response"},
    Parts(
        mean=lambda x, mask, n: (
            (x * mask).sum(1) / mask.sum(1) * mask.sum(1)
        ).sum() / (mask.sum() if n is None else n)
    ),
)  # fmt: skip
wrong(
    "logits standardised over the batch",
    "own",
    {"4": "masked logits change the loss"},
    Parts(prepare=lambda s, t: (s / s.std() * 1.5, t / t.std() * 1.5)),
)
wrong(
    "T^2 on the hard term too",
    "own",
    {"i2": "not the cross-entropy"},
    Parts(hard_scale=lambda t: t**2),
)
wrong(
    "skew weights swapped",
    "own",
    {"2": "another divergence"},
    Parts(
        soft=lambda s, t: kl(
            t.log_softmax(-1), (0.9 * t.softmax(-1) + 0.1 * s.softmax(-1)).log()
        )
    ),
    divergence="skew_kl",
    params={"alpha": 0.1},
)
wrong(
    "total variation without its half",
    "own",
    {"i1": "2 times what it should be"},
    Parts(soft=lambda s, t: (s.softmax(-1) - t.softmax(-1)).abs().sum(-1)),
    divergence="tvd",
)
wrong(
    "a sum that is called a mean",
    "own",
    {"i1": "a sum where a mean is declared"},
    Parts(mean=lambda x, mask, n: (x * mask).sum()),
    options=OPTIONS - {"num_items"},
)
wrong(
    "sign",
    "own",
    {"i1": "the sign is wrong"},
    Parts(soft=lambda s, t: -Parts().soft(s, t)),
)

ALIVE = "no divergence between two different models"
wrong(
    "always zero",
    "own",
    {law: ALIVE for law in "4567"} | {"3": "no gradient", "11": "no gradient"},
    lambda s, t, labels, **_: 0 * s.sum(),
)
wrong(
    "NaN",
    "own",
    {law: ALIVE for law in "4567"} | {"i1": "not the gradient"},
    lambda s, t, labels, **_: s.sum() * math.nan,
)
wrong(
    "an error in the loss",
    "own",
    {law: "raises RuntimeError" for law in ("1", "2", "3", "4", "i1", "i2", "i3")},
    lambda s, t, labels, **_: s.view(-1, 1009),
)
wrong(
    "the last token of a row that fills the batch is left out",
    "own",
    {"3": "supervised tokens are left out"},
    Parts(mask=lambda labels: F.pad(labels[:, :-1] != -100, (0, 1))),
)
wrong(
    "squared Hellinger called total variation",
    "own",  # both are symmetric: a swap would not show
    {"2": "another divergence"},
    Parts(
        soft=lambda s, t: (
            0.5 * (s.softmax(-1).sqrt() - t.softmax(-1).sqrt()).square().sum(-1)
        )
    ),
    divergence="tvd",
)
wrong(
    "a knob that nothing is tied to",
    "own",
    {"10": "beta does not lead to forward_kl and reverse_kl"},
    lambda s, t, labels, *, beta=0.0, **options: Parts()(s, t, labels, **options),
    knob=("beta", "forward_kl", "reverse_kl"),
)
wrong(
    "a knob that nothing is tied to, at its other end",
    "own",
    {"10": "beta does not lead to forward_kl and reverse_kl"},
    lambda s, t, labels, *, beta=0.0, **options: Parts(
        soft=lambda a, b: Parts().soft(b, a)
    )(s, t, labels, **options),
    divergence="reverse_kl",
    knob=("beta", "forward_kl", "reverse_kl"),
)
wrong(
    "positions beyond a fixed length are left out",
    "own",
    {"4": "padding on the left moves the mask"},
    Parts(mask=lambda labels: (labels != -100) & (torch.arange(labels.shape[1]) < 7)),
)
wrong(
    "divided by log V",
    "own, normalised entropies",
    {"7": "the scale depends on the vocabulary"},
    Parts(soft=lambda s, t: Parts().soft(s, t) / math.log(s.shape[-1])),
)
wrong(
    "mean over the vocabulary, and no T^2",
    "museum 6, 22",
    {"i1": "mean over the vocabulary"},
    Parts(soft=lambda s, t: Parts().soft(s, t) / s.shape[-1], scale=lambda t: 1.0),
)
wrong(
    "all positions in the denominator, labels shifted",
    "museum 4",
    {"4": "padding dilutes the mean", "i1": "padding counts in the mean"},
    lambda s, t, labels, **options: labels_shifted(
        s, t, labels, mean=lambda x, mask, n: (x * mask).sum() / mask.numel(), **options
    ),
    options=OPTIONS - {"num_items"},
)
wrong(
    "divided by rows",
    "own",
    {"i1": "divided by rows, not by tokens"},
    Parts(mean=lambda x, mask, n: (x * mask).sum() / len(x)),
    options=OPTIONS - {"num_items"},
)
wrong(
    "a token mean that is called a mean of sequences",
    "own",
    {"i1": "tokens are averaged", "5": "do not add up"},
    Parts(),
    reduction="sequence_mean",
    options=OPTIONS - {"num_items"},
)
wrong(
    "probabilities floored at 1e-8",
    "own",
    {"12": "underflowed"},
    Parts(
        soft=lambda s, t: (
            t.softmax(-1) * (t.log_softmax(-1) - s.softmax(-1).clamp_min(1e-8).log())
        ).sum(-1)
    ),
)
wrong(
    "log-ratio clipped",
    "own, as in PPO",
    {"9": "not that of reverse KL"},
    estimator=lambda s, t: (s - t).clamp(-1, 1).detach() * s,
)

# Small mistakes, just above the rounding that a law forgives.


def epsilon(eps):
    return lambda s, t: (
        t.softmax(-1) * (t.log_softmax(-1) - (s.softmax(-1) + eps).log())
    ).sum(-1)


wrong(
    "an epsilon in the student's logarithm",
    "own",
    {"1": "not at the minimum", "2": "another", "i1": "not the", "i3": "do not agree"},
    Parts(soft=epsilon(1e-5)),
)
wrong(
    "an epsilon in the student's logarithm, float32",
    "own",
    {"1": "not at the minimum", "2": "another", "i1": "not the", "i3": "do not agree"},
    Parts(soft=epsilon(1e-3)),
    dtype=torch.float32,
)
wrong(
    "a small epsilon in the student's logarithm, float32",
    "own",
    {"1": "not at the minimum", "i3": "do not agree"},
    Parts(soft=epsilon(1e-6)),
    dtype=torch.float32,
)
wrong(
    "an epsilon beside the temperature",
    "own",
    {"i1": "nearly the right gradient"},
    Parts(student_t=lambda t: t + 1e-5),
)
wrong(
    "a little of the padding in the denominator",
    "own",
    {"4": "padding dilutes the mean"},
    Parts(
        mean=lambda x, mask, n: (x * mask).sum() / (mask.sum() + 1e-5 * mask.numel())
    ),
    options=OPTIONS - {"num_items"},
)
wrong(
    "z-loss left in",
    "own, PaLM's regulariser",
    {"6": "softmax of the student overflows or is not normalised"},
    Parts(soft=lambda s, t: Parts().soft(s, t) + 1e-10 * s.logsumexp(-1).square()),
)
wrong(
    "a scale that drifts with the vocabulary",
    "own",
    {"7": "the scale depends on the vocabulary"},
    Parts(soft=lambda s, t: Parts().soft(s, t) / (1 + 1e-6 * s.shape[-1])),
)
for least, most in ((5e-5, 1.0), (0.0, 1 - 5e-5)):
    wrong(
        f"a knob kept between {least} and {most}",
        "own",
        {"10": "lam does not lead to forward_kl and reverse_kl"},
        lambda s, t, labels, *, lam=0.5, least=least, most=most, **options: (
            direction_knob(s, t, labels, lam=min(max(lam, least), most), **options)
        ),
        divergence="kl_mix",
        knob=("lam", "forward_kl", "reverse_kl"),
        options=OPTIONS - {"hard_weight"},
    )
wrong(
    "an epsilon beside the advantage's scale",
    "own",
    {"9": "not that of reverse KL"},
    estimator=lambda s, t: ((s - t) / (1 + 1e-5)).detach() * s,
)


def straight_through(value, gradient):
    """The value of one loss with the gradient of another: half of a bug each."""

    def fn(*arguments, **options):
        shown, used = (f(*arguments, **options) for f in (value, gradient))
        return shown.detach() + used - used.detach()

    return fn


HALVES = {  # (law, bug's name): what is slightly wrong
    ("5", "micro-batches add up to 1 times"): {
        "fn": Parts(
            mean=lambda x, mask, n: (
                (x * mask).sum() / (mask.sum() if n is None else n + 1e-4)
            )
        ),
    },
    ("i2", "at hard_weight 1 it is not the cross-entropy"): {
        "fn": Parts(hard_scale=lambda t: 1 + 1e-5)
    },
    ("12", "log-probabilities in bfloat16"): {"fn": Parts(half=True)},
    ("13", "the fused path optimises another objective"): {
        "fused": lambda *a, **o: (1 + 1e-5) * fused()(*a, **o),
        **FUSED,
    },
}
for (law, bug), declared in HALVES.items():
    (path, right) = ("fused", fused()) if "fused" in declared else ("fn", Parts())
    for half in ("value", "gradient"):
        both = right, declared[path]
        value, gradient = both if half == "gradient" else both[::-1]
        wrong(
            f"law {law}: the {half} alone",
            "own",
            {law: bug},
            **declared | {path: straight_through(value, gradient)},
        )
wrong(
    "law 1: the gradient alone",
    "own",
    {"1": "identical models are not at the minimum"},
    straight_through(
        Parts(), Parts(weights=lambda w: (1 - w, w + 1e-6 * (w == 0)))
    ),
)  # fmt: skip

# --- right ones -----------------------------------------------------------------------


def chunked(student, teacher, labels, **options):
    """Two rows at a time, added up by the global count."""
    tokens = int((labels[:, 1:] != -100).sum())
    options = {"num_items": tokens} | options
    parts = zip(*(x.split(2) for x in (student, teacher, labels)), strict=True)
    return sum(Parts()(*part, **options) for part in parts)


class ClosedForm(torch.autograd.Function):
    """Forward KL with the gradient written by hand, p_s - p_t."""

    @staticmethod
    def forward(ctx, s, t):
        ctx.save_for_backward(s.softmax(-1) - t.softmax(-1))
        return kl(t.log_softmax(-1), s.log_softmax(-1))

    @staticmethod
    def backward(ctx, upstream):
        return upstream.unsqueeze(-1) * ctx.saved_tensors[0], None


def selected(student, teacher, labels, *, temperature=1.0, num_items=None):
    """Rows selected by the mask, then torch's batchmean: the sum over N, by N."""
    mask = labels[:, 1:] != -100
    s, t = (
        x[:, :-1][mask].to(torch.promote_types(x.dtype, torch.float32)) / temperature
        for x in (student, teacher)
    )
    total = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    return total * temperature**2 * (1 if num_items is None else len(s) / num_items)


def labels_shifted(student, teacher, labels, mean=Parts.mean, **options):
    """Labels moved to the left and filled up, instead of logits cut."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return Parts(shift=False, mean=mean)(student, teacher, labels, **options)


def direction_knob(s, t, labels, *, lam=0.5, **options):
    forward = Parts()(s, t, labels, **options)
    reverse = Parts(soft=lambda a, b: Parts().soft(b, a))(s, t, labels, **options)
    return (1 - lam) * forward + lam * reverse


def sequence_mean(x, mask, n):
    by_row = (x * mask).sum(1) / mask.sum(1).clamp_min(1)
    return by_row.sum() / ((mask.sum(1) > 0).sum() if n is None else n)


def same_tokens(teacher_ids, teacher_labels, student_ids, student_labels):
    for rows in zip(teacher_labels.tolist(), student_labels.tolist(), strict=True):
        teacher, student = ([x for x in row if x != -100] for row in rows)
        assert teacher == student


def frozen(module, ids):
    was = module.training
    with torch.no_grad():
        logits = module.eval()(ids).logits
    module.train(was)
    return logits


RIGHT = [
    declare("plain", Parts()),
    declare("without options", Parts(), options=frozenset()),
    declare(
        "half of it hard by default, as Liger-Kernel's",
        lambda *batch, hard_weight=0.5, **o: Parts()(
            *batch, hard_weight=hard_weight, **o
        ),
    ),
    declare("float32", Parts(), dtype=torch.float32),
    declare(
        "cross-entropy minus entropy",
        Parts(
            soft=lambda s, t: (
                t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))
            ).sum(-1)
        ),
    ),
    declare(
        "logsumexp form",
        Parts(
            soft=lambda s, t: (
                (t.softmax(-1) * (t - s)).sum(-1) - t.logsumexp(-1) + s.logsumexp(-1)
            )
        ),
    ),
    declare("rows selected, batchmean", selected, options=OPTIONS - {"hard_weight"}),
    declare("labels shifted, not logits", labels_shifted),
    declare("chunked", chunked),
    declare(
        "logsumexp form, float32",
        Parts(
            soft=lambda s, t: (
                (t.softmax(-1) * (t - s)).sum(-1) - t.logsumexp(-1) + s.logsumexp(-1)
            )
        ),
        dtype=torch.float32,
        half=False,  # of two close models, float32 leaves it few digits
    ),
    declare("gradient by hand", Parts(soft=ClosedForm.apply)),
    declare("no T^2, declared", Parts(scale=lambda t: 1.0), scale_by_t2=False),
    declare(
        "sum, declared",
        Parts(mean=lambda x, mask, n: (x * mask).sum()),
        reduction="sum",
        options=OPTIONS - {"num_items"},
    ),
    declare(
        "sequence means, declared", Parts(mean=sequence_mean), reduction="sequence_mean"
    ),
    declare(
        "a mean without num_items, weighted by the caller",
        Parts(),
        options=OPTIONS - {"num_items"},
    ),
    declare(
        "summed by a trainer that counts",
        Parts(),
        accumulate=lambda parts: sum(
            Parts()(
                *p, num_items=sum(int((q.labels[:, 1:] != -100).sum()) for q in parts)
            )
            for p in parts
        ),
    ),
    declare(
        "cross-entropy, declared",
        Parts(soft=lambda s, t: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1)),
        divergence="cross_entropy",
    ),
    declare(
        "reverse KL",
        Parts(soft=lambda s, t: kl(s.log_softmax(-1), t.log_softmax(-1))),
        divergence="reverse_kl",
    ),
    declare(
        "JSD",
        Parts(soft=lambda s, t: mixed_jsd(s, t, 0.3)),
        divergence="generalized_jsd",
        params={"beta": 0.3},
    ),
    declare(
        "squared Hellinger, by a formula of its own",
        Parts(
            soft=lambda s, t: (
                (s.softmax(-1).sqrt() - t.softmax(-1).sqrt()).square().sum(-1)
            )
        ),
        divergence=lambda p, q: 2 - 2 * (p * q).sqrt().sum(-1),
        half=False,  # it cancels near p = q, which float32 shows
    ),
    declare(
        "padded columns cut off",
        Parts(prepare=lambda s, t: (s, t[..., : s.shape[-1]])),
        padded=True,
    ),
    declare(
        "more columns, masked",
        Parts(
            prepare=lambda s, t: (s, t[..., : s.shape[-1]]),
            soft=lambda s, t: kl(
                *(F.pad(x, (0, 3), value=-1e30).log_softmax(-1) for x in (t, s))
            ),
        ),
        padded=True,
    ),
    declare(
        "a knob of direction",
        direction_knob,
        divergence="kl_mix",
        knob=("lam", "forward_kl", "reverse_kl"),
        options=OPTIONS - {"hard_weight"},
    ),
    LossUnderTest("score function", estimator=lambda s, t: (s - t).detach() * s),
    LossUnderTest("k2", estimator=lambda s, t: 0.5 * (s - t).square()),
    LossUnderTest(
        "k3's value with k2's gradient",
        estimator=lambda s, t: (
            (0.5 * (s - t).square())
            - (0.5 * (s - t).square()).detach()
            + ((t - s).exp() - 1 - (t - s)).detach()
        ),
    ),
    LossUnderTest(
        "top-k with a tail bucket",
        top_k=on_support("teacher", lambda s, t: kl(bucket(t), bucket(s))),
    ),
    LossUnderTest("fused in one piece", fused=fused(), **FUSED),
    LossUnderTest(
        "fused, no T^2 and no soft cap, declared",
        fused=lambda *a, **o: fused()(*a, **o) / o.get("temperature", 1.0) ** 2,
        fused_options=frozenset(("temperature",)),
    ),
    LossUnderTest("tokens compared", pair=same_tokens, teacher=frozen),
]
