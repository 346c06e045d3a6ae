"""The laws of every distillation loss, and the name of the bug where one is broken.

Distillation code fails silently: the loss is finite, falls, and optimises something
else. Each law has a number that is measured on the loss and one that is known, by a
formula on probabilities in float64 or by enumeration (exact.py). None compares a loss
with another implementation of it.

Knows: what to ask. How a loss is asked, and what is true, stands in loss_under_test.py.

Fifteen laws, and three identities (i1 to i3) that alone catch 13 of 13 bugs known from
teaching code. "museum 6" in the name of a bug is row 6 of the course's table of
failures found in the field's libraries; other references are issues on GitHub.

A verdict is passed, failed (with the bug's name), or not_applicable: the loss cannot be
asked, or its documentation states what its departure leads to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch

from kdlib.errors import ArgumentError
from kdlib.exact import (
    ExactLM,
    estimator_moments,
    on_policy_gradient,
    sequence_forward_kl,
)
from kdlib.loss_under_test import (
    FORMULAS,
    Batch,
    LossUnderTest,
    NotApplicable,
    ask,
    differentiate,
    make_batch,
    truth,
    value,
)

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not_applicable"


@dataclass(frozen=True)
class Verdict:
    """What one law says of one loss; bug is None unless it failed."""

    law: str
    title: str
    status: str
    measured: str = ""
    expected: str = ""
    bug: str | None = None
    note: str = ""


class Finding(NamedTuple):
    measured: float | str
    expected: float | str
    bug: str | None  # None where the law holds


LAWS: dict[str, tuple[str, Callable[[LossUnderTest], Finding]]] = {}


def run(loss: LossUnderTest, only: str | None = None) -> list[Verdict]:
    """The verdict of every law, or of one. A loss that raises on a batch has failed.

    Raises ArgumentError for a law that does not exist or a divergence without formula.
    """
    if only is not None and only not in LAWS:
        raise ArgumentError(f"law {only!r}", f"choose one of {', '.join(LAWS)}")
    if not callable(loss.divergence) and loss.divergence not in FORMULAS:
        raise ArgumentError(
            f"divergence {loss.divergence!r} of the loss {loss.name!r}",
            f"give a formula (p_t, p_s), or one of {', '.join(FORMULAS)}",
        )
    return [_verdict(loss, law) for law in LAWS if only in (None, law)]


def _verdict(loss, law) -> Verdict:
    title, question = LAWS[law]
    try:
        if law in loss.reasons:
            raise NotApplicable(loss.reasons[law])
        finding = question(loss)
    except NotApplicable as reason:
        return Verdict(law, title, NOT_APPLICABLE, note=str(reason))
    except Exception as error:  # on a plain batch, whatever it raises is its failure
        line = str(error).partition("\n")[0]
        bug = f"raises {type(error).__name__}: {line}"
        return Verdict(law, title, FAILED, "an exception", "a number", bug)
    measured, expected = (x if isinstance(x, str) else f"{x:.4g}" for x in finding[:2])
    if finding.bug is None:
        return Verdict(law, title, PASSED, measured, expected)
    if law in loss.documented:
        note = f"documented: {loss.documented[law]} ({finding.bug})"
        return Verdict(law, title, NOT_APPLICABLE, measured, expected, note=note)
    return Verdict(law, title, FAILED, measured, expected, finding.bug)


def _law(number, title):
    def register(question):
        LAWS[number] = title, question
        return question

    return register


def _near(measured, expected, rel=1e-3, zero=1e-6) -> bool:
    return abs(measured - expected) <= rel * abs(expected) + zero  # False for NaN


def _gap(gradient, expected) -> float:
    return _ratio(float((gradient - expected).norm()), float(expected.norm()))


def _ratio(a, b) -> float:
    return a / b if b else math.nan


def _parallel(a, b) -> bool:
    cosine = torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0)
    return float(cosine) > 0.99999


# --- fifteen laws ---------------------------------------------------------------------


@_law("1", "zero, with zero gradient, at p = q")
def _zero_at_equality(loss):
    batch = make_batch(loss)
    batch = batch._replace(teacher=batch.student.clone())
    measured, gradient = ask(loss, batch)
    expected = float(truth(loss, batch))  # for cross-entropy, the teacher's entropy
    slope = float(gradient.abs().max())
    other = torch.where(batch.labels < 0, -100, batch.labels // 2)
    bug = None
    if not _near(measured, expected) or not slope < 1e-6:
        bug = "identical models are not at the minimum"
        if not _near(float(value(loss, batch._replace(labels=other))), measured):
            bug = "hard labels in the soft loss (museum 20)"
        elif _is_entropy(loss, batch, measured):
            bug = NO_ENTROPY
    return Finding(
        f"{measured:.3g}, slope {slope:.0e}", f"{expected:.3g}, slope 0", bug
    )


NO_ENTROPY = "the teacher's entropy is not subtracted: a cross-entropy reported as KL"


def _is_entropy(loss, batch, measured, temperature=1.0) -> bool:
    entropy = truth(loss, batch, temperature, formula=FORMULAS["cross_entropy"])
    return _near(measured, float(entropy))


@_law("2", "direction, on a pair that is worked by hand")
def _direction(loss):
    a, b = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], dtype=loss.dtype)
    labels = torch.tensor([[-100, 0, 0]])

    def teacher_student(p, q):  # the same at each position, so that shifts do not show
        student, teacher = (x.log().repeat(1, 3, 1) for x in (q, p))
        return float(value(loss, Batch(student, teacher, labels)))

    # Forward KL is 0.498 one way and 0.585 the other. A ratio, so that scale drops out.
    measured = _ratio(teacher_student(a, b), teacher_student(b, a))
    a, b = a[None].double(), b[None].double()
    expected = float(loss.formula(a, b) / loss.formula(b, a))
    bug = None
    if not _near(measured, expected):
        bug = "another divergence than the one declared"
        if _near(measured, 1 / expected):
            bug = SWAPPED
    return Finding(measured, expected, bug)


SWAPPED = "the direction of the divergence is swapped (museum 12)"


@_law("3", "gradient where a supervised token is predicted, and only there")
def _gradient_support(loss):
    batch = make_batch(loss)
    gradient = ask(loss, batch)[1]
    measured = {tuple(at) for at in gradient.abs().amax(-1).nonzero().tolist()}
    supervised = {tuple(at) for at in (batch.labels != -100).nonzero().tolist()}
    expected = {(row, t - 1) for row, t in supervised}
    bug = None
    if not measured:
        bug = "no gradient reaches the student"
    elif measured > expected:
        bug = "padding or prompt in the loss (museum 4)"
    elif measured == supervised:
        bug = "label shift off by one (museum 1)"
    elif measured == supervised & expected:  # of each response all but the first
        bug = "label shift off by one, without the end token (museum 2)"
    elif measured < expected:
        bug = "supervised tokens are left out"
    elif measured != expected:
        bug = "the wrong positions (museum 3)"
    rows = [f"row 0: {sorted(t for r, t in x if r == 0)}" for x in (measured, expected)]
    return Finding(*rows, bug)


@_law("4", "padding, masked logits and the order of rows change nothing")
def _padding(loss):
    batch, noise = make_batch(loss), make_batch(loss, seed=9)
    expected = float(value(loss, batch))
    unused = torch.ones_like(batch.labels, dtype=torch.bool)
    unused[:, :-1] = batch.labels[:, 1:] == -100

    def overwrite(logits, other):
        return torch.where(unused[..., None], other, logits)

    def pad(left, right):
        def widen(x, filling):
            sides = (
                x.new_full((len(x), n, *x.shape[2:]), filling) for n in (left, right)
            )
            return torch.cat([next(sides), x, next(sides)], dim=1)

        student, teacher, labels = batch
        return Batch(widen(student, 0.7), widen(teacher, 0.0), widen(labels, -100))

    changed = {
        "masked logits change the loss (museum 4)": Batch(
            overwrite(batch.student, noise.student),
            overwrite(batch.teacher, noise.teacher),
            batch.labels,
        ),
        "padding dilutes the mean (museum 4)": pad(0, 3),
        "padding on the left moves the mask (museum 4)": pad(2, 0),
        "the order of the rows changes the loss": Batch(*(x[[2, 0, 1]] for x in batch)),
    }
    if (
        loss.reduction != "sequence_mean"
    ):  # whether an empty row counts there: convention
        empty = noise._replace(labels=torch.full_like(batch.labels, -100))
        changed["a row without response changes the loss"] = Batch(
            *(torch.cat(both) for both in zip(batch, empty, strict=True))
        )
    for bug, other in changed.items():
        measured = float(value(loss, other))
        if not _near(measured, expected):
            return Finding(measured, expected, bug)
    return Finding(measured, expected, None)


@_law("5", "micro-batches add up to the batch")
def _micro_batches(loss):
    batch = make_batch(loss)

    def count(labels):
        tokens = int((labels[:, 1:] != -100).sum())
        return tokens if loss.reduction == "token_mean" else len(labels)

    def parts(b):
        return [Batch(*(x[rows] for x in b)) for rows in ([0], [1, 2])]

    def split(b):
        total = count(b.labels)
        if loss.accumulate:
            return loss.accumulate(parts(b))
        if loss.reduction == "sum":
            return sum(value(loss, p) for p in parts(b))
        if "num_items" in loss.options:
            return sum(value(loss, p, num_items=total) for p in parts(b))
        return sum(value(loss, p) * (count(p.labels) / total) for p in parts(b))

    expected, whole = ask(loss, batch)
    measured, added = differentiate(split, batch)
    factor = _ratio(float((added * whole).sum()), float((whole * whole).sum()))
    bug = None
    if not (_gap(added, whole) < 1e-3 and _near(measured, expected)):
        bug = "micro-batches do not add up to the batch"
        rows = differentiate(lambda b: truth(loss, b, reduction="sequence_mean"), batch)
        means = differentiate(lambda b: sum(value(loss, p) for p in parts(b)), batch)
        if _gap(added, factor * whole) < 1e-3:
            bug = f"micro-batches add up to {factor:.2g} times the batch (museum 8)"
        elif _parallel(added, means[1]) and not _parallel(whole, means[1]):
            bug = "micro-batch means: tokens of short ones weigh more (museum 8)"
        elif loss.reduction == "token_mean" and _parallel(whole, rows[1]):
            bug = "sequence means averaged, a token mean is declared (torchtune#1865)"
    error = f"{measured:.4g}, gradient off by {_gap(added, whole):.1%}"
    return Finding(error, expected, bug)


@_law("6", "a constant added to all logits changes nothing")
def _logit_shift(loss):
    batch = make_batch(loss)
    # Multiples of 1/256, so that adding 1024 is exact in float32 as well.
    batch = Batch(*(torch.round(x * 256) / 256 for x in batch[:2]), batch.labels)
    expected = float(value(loss, batch))
    shift = torch.tensor([1024.0, -1024.0], dtype=loss.dtype).repeat(4)[:, None]
    for side in ("student", "teacher"):
        moved = batch._replace(**{side: getattr(batch, side) + shift})
        measured = float(value(loss, moved))
        if not _near(measured, expected):
            bug = f"the softmax of the {side} overflows or is not normalised"
            return Finding(measured, expected, bug)
    if not loss.padded:
        return Finding(measured, expected, None)
    # One model on both sides; the teacher has 4 untrained columns (logit 0) besides,
    # far below its own. Then the student's logits are lowered, which is no change.
    student = batch.student + 40
    untrained = torch.zeros_like(student[..., :4])
    padded = Batch(student, torch.cat([student, untrained], dim=-1), batch.labels)
    expected = float(value(loss, padded._replace(teacher=student)))
    for lowered in (0.0, 40.0):
        measured = float(value(loss, padded._replace(student=student - lowered)))
        if not _near(measured, expected, zero=1e-5):
            bug = "padded vocabulary columns take part in the softmax (museum 19)"
            shown = (
                f"{measured:.3g} with padded columns, student's logits {-lowered:+.0f}"
            )
            return Finding(shown, expected, bug)
    return Finding(measured, expected, None)


@_law("7", "the scale does not depend on the size of the vocabulary")
def _vocabulary_scale(loss):
    batch = make_batch(loss)
    dead = torch.full_like(batch.student, -1e4).repeat(1, 1, 4)
    wide = Batch(*(torch.cat([x, dead], dim=-1) for x in batch[:2]), batch.labels)
    ratio = _ratio(float(value(loss, wide)), float(value(loss, batch)))
    bug = None
    if not _near(ratio, 1.0):
        bug = "the scale depends on the vocabulary (museum 7)"
        if not math.isfinite(float(value(loss, wide))):
            bug = "tokens of no probability give NaN (museum 23)"
        if _near(ratio, 0.2):
            bug = "mean over the vocabulary: V times too small (museum 6)"
    return Finding(f"{ratio:.4g} times at 5 V", "1 times", bug)


@_law("8", "top-k: never negative, dense at k = V, sees the tail")
def _top_k(loss):
    if loss.top_k is None:
        raise NotApplicable("it takes no sparse targets")
    rng, k = torch.Generator().manual_seed(3), 4
    student, teacher = 2 * torch.randn(2, 6, 32, generator=rng, dtype=loss.dtype)
    order = teacher.argsort(-1, descending=True).argsort(-1)
    best, worst = order < k, order >= 32 - k

    def compare(s, t, k=k):
        dense = loss.formula(t.double().softmax(-1), s.double().softmax(-1))
        return loss.top_k(s, t, k).double(), dense

    measured, dense = compare(student, teacher, 32)
    if not torch.allclose(measured, dense, rtol=1e-3, atol=1e-5):
        return Finding(measured[0], dense[0], "not the dense loss at k = V")
    cases = {  # (student, teacher), each with a divergence far from zero
        "negative, or clamped to nothing: cut off, no divergence (museum 16)": (
            1.4 * teacher,
            teacher,
        ),
        # right ratios on the teacher's best tokens, and nearly all mass elsewhere
        "blind to mass that the student puts in the tail (museum 14)": (
            torch.where(best, teacher - 8.0, student),
            teacher,
        ),
        # right ratios on the student's best tokens, and the teacher is elsewhere
        "blind to a mode that the student lacks (museum 15)": (
            teacher,
            torch.where(worst, student + 12.0, teacher),
        ),
        "negative (museum 16)": (student, teacher),
    }
    for bug, case in cases.items():
        measured, dense = compare(*case)
        row = int((measured - 0.02 * dense).argmin())
        if not measured[row] >= 0.02 * dense[row]:
            return Finding(measured[row], f"near {dense[row]:.3g}", bug)
    leaf = teacher.clone().requires_grad_()
    slope = torch.autograd.grad(loss.top_k(leaf, teacher, k).sum(), leaf)[0].abs().max()
    bug = None
    if not slope < 1e-5:
        bug = "cut off: its minimum is not at p = q, so the student gets over-confident"
    return Finding(f"slope {slope:.0e} at p = q", "slope 0", bug)


@_law("9", "an estimator's expected gradient, by enumeration")
def _estimator(loss):
    if loss.estimator is None:
        raise NotApplicable("it estimates nothing from samples")
    teacher, student = (ExactLM.random(5, 2, scale=0.5, seed=s) for s in (1, 2))
    moments = estimator_moments(loss.estimator, teacher, student)
    best = estimator_moments(lambda s, t: (s - t).detach() * s, teacher, student)
    gradient, reverse = (
        _flat(moments.gradient),
        _flat(on_policy_gradient(teacher, student)),
    )
    leaves = student.leaves()
    forward_kl = sequence_forward_kl(teacher, leaves).sum()
    forward = _flat(torch.autograd.grad(forward_kl, leaves.tables))
    noise = float(moments.gradient_variance / best.gradient_variance)
    error, measured = _gap(gradient, reverse), f"off by {_gap(gradient, reverse):.1%}"
    bug = None
    if error < 1e-3 and noise > 1.2:
        measured = f"{noise:.2f} times the variance"
        bug = "un-detached advantage: the same mean, a noisier gradient (museum 25)"
    elif not error < 1e-3:
        bug = "its expected gradient is not that of reverse KL"
        if float(gradient.norm()) < 1e-6:
            bug = "its expected gradient is zero, like that of k1 (museum 13)"
        elif _parallel(gradient, forward):
            measured = "cosine 1.0000 with forward KL"
            bug = "its expected gradient is that of FORWARD KL, like k3's (museum 13)"
    return Finding(measured, "the gradient of reverse KL", bug)


def _flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


@_law("10", "the knob between two divergences makes no jump")
def _knob(loss):
    if loss.knob is None:
        raise NotApplicable("it has no knob from one divergence to another")
    batch, (name, *ends) = make_batch(loss), loss.knob
    places = (0.0, 0.001, 0.999, 1.0)
    at = [float(value(loss, batch, **{name: x})) for x in places]
    low, high = (float(truth(loss, batch, formula=FORMULAS[end])) for end in ends)
    bug = None
    if _near(at[0], high) and _near(at[3], low):
        bug = f"the ends of {name} are swapped (museum 12)"
    elif not (_near(at[0], low) and _near(at[3], high)):
        bug = f"{name} does not lead to {ends[0]} and {ends[1]}"
    elif not (_near(at[1], low, rel=0.02) and _near(at[2], high, rel=0.02)):
        bug = f"{name} is no knob of direction: it jumps at its ends (museum 11)"
    measured = ", ".join(f"D({x:g}) = {d:.3g}" for x, d in zip(places, at, strict=True))
    return Finding(measured, f"from {low:.3g} to {high:.3g}", bug)


@_law("11", "with T^2, the gradient keeps its scale as T grows")
def _temperature(loss):
    if "temperature" not in loss.options:
        raise NotApplicable("it has no temperature")
    batch = make_batch(loss)

    def exponent(gradient_at):  # of the gradient's size, as a power of T
        low, high = (float(gradient_at(t)[1].norm()) for t in (64.0, 512.0))
        return math.log(high / low) / math.log(8) if low and high else -math.inf

    measured = exponent(lambda t: ask(loss, batch, temperature=t))
    expected = exponent(lambda t: differentiate(lambda b: truth(loss, b, t), batch))
    off = measured - expected
    bug = None
    if not abs(off) < 0.05:
        bug = "only one side is softened"
        if math.isinf(off):
            bug = "no gradient reaches the student"
        elif abs(off + 2) < 0.05:
            bug = "T^2 is missing (museum 22)"
        elif abs(off + 1) < 0.05:
            bug = "T in place of T^2 (museum 22)"
        elif abs(off - 2) < 0.05:
            bug = "T^2 not declared, or the student is not softened (museum 22)"
    return Finding(f"T^{measured:.2f}", f"T^{expected:.2f}", bug)


@_law("12", "bfloat16 logits cost no more than their own rounding")
def _half_precision(loss):
    if not loss.half:
        raise NotApplicable("it is never given bfloat16 logits")
    far = make_batch(loss)  # probabilities of e^-200, which float32 cannot hold
    far.student[..., 0], far.student[..., 1] = 100.0, -100.0
    far.teacher[..., 0], far.teacher[..., 1] = -100.0, 100.0
    close = make_batch(loss, vocab=64, scale=2.0)
    close = close._replace(student=close.teacher + 0.01 * close.student)
    for batch in (far, close):  # the same numbers in both dtypes
        low = Batch(*(x.bfloat16() for x in batch[:2]), batch.labels)
        high = Batch(*(x.to(loss.dtype) for x in low[:2]), batch.labels)
        (measured, gradient), (expected, slope) = ask(loss, low), ask(loss, high)
        if batch is far and not _near(measured, expected, rel=0.05):
            bug = "the log of a probability that underflowed (museum 23)"
            return Finding(measured, expected, bug)
    error, size = float((gradient - slope).norm()), float(slope.norm())
    bug = None
    if not (_near(measured, expected, rel=0.05) and error <= 0.05 * size):
        bug = "log-probabilities in bfloat16 (museum 24)"
    shown = f"{measured:.3g}, gradient off by {_ratio(error, size):.1%}"
    return Finding(shown, expected, bug)


@_law("13", "fused equals naive, with temperature, soft cap and logit scale")
def _fused(loss):
    if loss.fused is None:
        raise NotApplicable("it takes logits, not hidden states")
    rng = torch.Generator().manual_seed(5)
    hidden, weight, t_hidden, t_weight = (
        torch.randn(shape, generator=rng, dtype=loss.dtype)
        for shape in ((6, 4), (11, 4), (6, 5), (11, 5))
    )
    labels = torch.tensor([[-100, 0]]).repeat(6, 1)  # position 0 of each row counts

    def naive(h, w, temperature=1.0, softcap=None, logit_scale=1.0):
        both = [logit_scale * a.double() @ b.double().T for a, b in ((h, w), teacher)]
        if softcap:
            both = [softcap * torch.tanh(x / softcap) for x in both]
        both = [x[:, None].repeat(1, 2, 1) for x in both]
        return truth(loss, Batch(*both, labels), temperature)

    def ask_both(function, **options):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        total = function(*leaves, **options)
        return float(total.detach()), _flat(torch.autograd.grad(total, leaves)).double()

    teacher = t_hidden, t_weight
    every = {"temperature": 2.0, "softcap": 2.0, "logit_scale": 0.3}
    options = [{k: v} for k, v in every.items() if k in loss.fused_options]
    for option in ({}, *options):
        measured, gradient = ask_both(
            lambda h, w, **o: loss.fused(h, w, *teacher, **o), **option
        )
        expected, slope = ask_both(naive, **option)
        error = _gap(gradient, slope)
        if not (_near(measured, expected) and error < 2e-3):
            bug = "the fused path optimises another objective (museum 20)"
            for name in option:
                bug = f"the fused path ignores or misuses {name} (museum 21)"
            shown = f"{measured:.4g}, gradient off by {error:.1%}"
            return Finding(shown, expected, bug)
    return Finding(f"equal, {1 + len(options)} settings", "equal", None)


@_law("14", "paired views hold the same response tokens, row by row")
def _paired_identity(loss):
    if loss.pair is None:
        raise NotApplicable("it does not pair two views")

    def view(prompts, responses):  # (ids, labels); a prompt is so many ones
        ids = torch.zeros(len(prompts), 12, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (n, tokens) in enumerate(zip(prompts, responses, strict=True)):
            ids[row, :n] = 1
            for x in (ids, labels):
                x[row, n : n + len(tokens)] = torch.tensor(tokens)
        return ids, labels

    student, response = view([1, 2], [[5, 6, 7], [8, 9]]), [[5, 6, 7], [8, 9]]
    try:
        loss.pair(*view([4, 3], response), *student)
    except Exception as error:
        return Finding(
            f"raises {type(error).__name__}", "accepted", "refuses equal views"
        )
    for bug, response in {
        "another number of response tokens passes": [[5, 6, 7], [8, 9, 9]],
        "only counted over the batch: errors that cancel pass (museum 29)": [
            [5, 6],
            [7, 8, 9],
        ],
        "only counted: other tokens pass (museum 29)": [[5, 6, 7], [8, 4]],
    }.items():
        try:
            loss.pair(*view([4, 3], response), *student)
        except Exception:
            continue
        return Finding(f"{response} accepted", "refused", bug)
    return Finding("refused", "refused", None)


@_law("15", "the teacher is used, and stays as it was")
def _teacher(loss):
    if loss.teacher:
        return _frozen(loss.teacher)
    batch = make_batch(loss)
    before, gradient = ask(loss, batch)
    if not all(map(torch.equal, batch, make_batch(loss))):
        return Finding("changed", "as it was", "the inputs are changed in place")
    after, other = ask(loss, batch._replace(teacher=make_batch(loss, seed=7).teacher))
    moved = float((other - gradient).norm())
    bug = None
    if _near(before, after):
        bug = "the teacher is asked and never used (museum 33)"
    elif moved < 1e-6:
        bug = "the teacher moves the number, not the gradient (labml#66)"
    return Finding(f"moves the gradient by {moved:.2g}", "not 0", bug)


class _ToyTeacher(torch.nn.Module):
    """The least that looks like a causal LM; dropout tells train from eval."""

    def __init__(self):
        super().__init__()
        self.embed, self.dropout = torch.nn.Embedding(16, 32), torch.nn.Dropout(0.5)

    def forward(self, input_ids, **_):
        hidden = self.dropout(self.embed(input_ids))
        return SimpleNamespace(logits=hidden @ self.embed.weight.T)


def _frozen(ask_teacher):
    module, ids = _ToyTeacher().train(), torch.arange(12).view(2, 6)
    first, second = (ask_teacher(module, ids) for _ in range(2))
    bug = None
    if not torch.equal(first, second):
        bug = "the teacher is left in train mode: its dropout is noise in the target"
    elif first.requires_grad:
        bug = "the teacher's targets carry a gradient: it would be trained"
    return Finding("frozen" if bug is None else "not frozen", "frozen", bug)


# --- three identities -----------------------------------------------------------------


@_law("i1", "the closed-form gradient, at T = 2")
def _closed_form(loss):
    batch, t = make_batch(loss), 2.0 if "temperature" in loss.options else 1.0
    # On one token the teacher is sure, and the student far off.
    batch.student[0, 2, 0], batch.teacher[0, 2, 0] = -14.0 * t, 9.0 * t
    gradient = ask(loss, batch, temperature=t)[1]

    def known(**wrong):
        return differentiate(lambda b: truth(loss, b, t, **wrong), batch)[1]

    error = _gap(gradient, known())
    bug = None if error < 1e-3 else _name(loss, batch, t, gradient, known)
    return Finding(f"off by {error:.2%}", "0%", bug)


def _name(loss, batch, t, gradient, known) -> str:
    """The known mistake whose gradient this is: a factor, or another direction."""
    expected, rows = known(), len(batch.labels)
    tokens = int((batch.labels[:, 1:] != -100).sum())
    positions, vocab = batch.labels.numel(), batch.student.shape[-1]
    if not gradient.any():
        return "no gradient: the teacher's logits on both sides (labml#66)"
    factor = float((gradient * expected).sum() / (expected * expected).sum())
    factors = {
        "T^2 is missing (museum 22)": [t**-2],
        "T in place of T^2 (museum 22)": [1 / t],
        "T^2 where none is declared (museum 22)": [t**2],
        "mean over the vocabulary (museum 6)": [1 / vocab, 1 / vocab / t**2],
        "padding counts in the mean (museum 4)": [
            tokens / positions,
            tokens / (positions - rows),
        ],
        "divided by rows, not by tokens": [tokens / rows],
        "a sum where a mean is declared": [tokens],
        "the sign is wrong": [-1.0],
    }
    if _gap(gradient, factor * expected) < 1e-3:
        for bug, values in factors.items():
            if any(_near(factor, x) and x != 1 for x in values):
                return bug
        return f"the gradient is {factor:.3g} times what it should be"
    mistakes = {
        SWAPPED: {"formula": lambda p, q: loss.formula(q, p)},
        "only the teacher is softened": {"t_student": 1.0},
        "only the student is softened": {"t_teacher": 1.0},
        "the temperature is ignored (museum 22)": {"t_student": 1.0, "t_teacher": 1.0},
        "probabilities in the place of log-probabilities (ProDA#20)": {
            "formula": lambda p, q: -(p * q).sum(-1)
        },
        "clamped: no gradient where the student is most wrong (museum 18)": {
            "formula": lambda p, q: -(p * q.log().clamp_min(-10)).sum(-1)
        },
        "label shift off by one (museum 1)": {"mask": batch.labels[:, :-1] != -100},
        "label shift off by one, without the end token (museum 2)": {
            "mask": (batch.labels[:, :-1] != -100) & (batch.labels[:, 1:] != -100)
        },
        "padding or prompt in the loss (museum 4)": {
            "mask": batch.labels[:, 1:] > -999
        },
        "sequence means are averaged (torchtune#1865)": {"reduction": "sequence_mean"},
        "tokens are averaged": {"reduction": "token_mean"},
    }
    for bug, wrong in mistakes.items():
        if _parallel(gradient, known(**wrong)):
            return bug
    return "not the gradient of the divergence that is declared"


@_law("i2", "at hard_weight 1, cross-entropy at temperature 1")
def _hard_weight_one(loss):
    if "hard_weight" not in loss.options:
        raise NotApplicable("it has no hard-label term")
    batch = make_batch(loss)
    measured, gradient = ask(loss, batch, temperature=2.0, hard_weight=1.0)
    # Hard labels are a teacher who is certain of the next token.
    following = batch.labels.roll(-1, 1).clamp_min(0)
    certain = torch.nn.functional.one_hot(following, batch.student.shape[-1]) * 1e4

    def known(b, t=1.0):
        hard = b._replace(teacher=certain)
        return truth(loss, hard, formula=FORMULAS["cross_entropy"], t_student=t)

    expected, slope = differentiate(known, batch)
    error = _gap(gradient, slope)
    bug = None
    if not (error < 1e-3 and _near(measured, expected)):
        bug = "at hard_weight 1 it is not the cross-entropy"
        if _near(measured, float(known(batch, 2.0))):
            bug = "the cross-entropy is softened as well"
        elif _near(measured, float(truth(loss, batch, 2.0))):
            bug = "hard_weight is swapped: it weighs the soft term"
    return Finding(f"{measured:.4g}, gradient off by {error:.1%}", expected, bug)


@_law("i3", "zero at p = q, at T = 2")
def _zero_at_temperature(loss):
    batch, t = make_batch(loss, seed=4), 2.0 if "temperature" in loss.options else 1.0
    batch = batch._replace(teacher=batch.student.clone())
    measured = float(value(loss, batch, temperature=t))
    expected = float(truth(loss, batch, t))
    one_sided = (
        float(truth(loss, batch, t, **{side: 1.0}))
        for side in ("t_student", "t_teacher")
    )
    bug = None
    if not _near(measured, expected):
        bug = "identical models do not agree"
        if _is_entropy(loss, batch, measured, t):
            bug = NO_ENTROPY
        elif any(_near(measured, x) for x in one_sided):
            bug = "only one side is softened"
    return Finding(measured, expected, bug)
