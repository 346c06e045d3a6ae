"""Broken training steps, each with the cause that the doctor must name.

`Loop` is a distillation loss as one finds it in the field, written without kdlib's own
objective; every fault replaces one part of it, or of the batch. doctor_table.py makes
the confusion table of them, tests/test_doctor.py holds the doctor to it.

`seen` names a sighting: owner/repository#number is an issue on GitHub. Where none is
known, none is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from kdlib import localize, models
from kdlib.objective import Objective
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.sparse_targets import SparseTargets, sampled_targets, top_k_targets
from kdlib.teachers import LiveTeacher
from kdlib.views import PairedBatch, View


@dataclass(frozen=True)
class Case:
    """name: of the case; expected: what the doctor has to answer, no more, no less
    make: Bench -> the arguments of examine_batch
    """

    name: str
    expected: frozenset[str]
    make: Callable[[Bench], dict]
    seen: str = ""


FAULTS: list[Case] = []
HEALTHY: list[Case] = []


def fault(*expected: str, name: str = "", seen: str = ""):
    def register(make):
        FAULTS.append(Case(name or expected[0], frozenset(expected), make, seen))
        return make

    return register


def healthy(name: str):
    def register(make):
        HEALTHY.append(Case(name, frozenset(), make))
        return make

    return register


class Bench:
    """The shipped teacher, a small student, and eight French examples."""

    def __init__(self):
        self.teacher, self.tokenizer = models.load("teacher")
        self.collator = PairCollator(self.tokenizer)
        self.examples = localize.examples(
            "test", locales=["fr"], formats=["long"], limit=7
        )

    @cached_property
    def student(self):
        """Sharp enough that its probabilities differ: a random one says nothing."""
        student = models.build(self.tokenizer, hidden_size=32, layers=1, heads=2)
        with torch.no_grad():
            student.lm_head.weight.mul_(2.0)
        return student

    @cached_property
    def pairs(self) -> list[EncodedPair]:
        return [self.collator.encode(e, i) for i, e in enumerate(self.examples)]

    @cached_property
    def batch(self) -> PairedBatch:
        """Context distillation: the teacher alone reads the instruction."""
        return self.collator.collate(self.pairs)

    @cached_property
    def plain(self) -> PairedBatch:
        """Ordinary distillation: both sides read the same."""
        return self.collator([replace(e, context="") for e in self.examples])

    def whole(self, **changes) -> dict:
        """Everything that is right, with changes."""
        right = {
            "student": self.student,
            "batch": self.batch,
            "objective": Objective(),
            "teacher": LiveTeacher(self.teacher),
            "collator": self.collator,
        }
        return right | changes

    def loop(self, objective: Objective | None = None, **parts) -> dict:
        """The Loop with parts replaced, and the objective that it declares."""
        objective = Objective(temperature=2.0) if objective is None else objective
        batch = parts.pop("batch", self.batch)
        teacher = parts.pop("teacher", self.teacher)
        student = parts.pop("student", self.student)
        return {
            "student": student,
            "batch": batch,
            "objective": objective,
            "teacher": teacher,
            "collator": self.collator,
            "loss": Loop(teacher, objective, **parts),
        }


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward(s, t):
    return kl(t.log_softmax(-1), s.log_softmax(-1))


def call(model, view: View):
    return model(
        input_ids=view.input_ids, attention_mask=view.attention_mask.long()
    ).logits


def shifted(view: View):
    """The positions that predict the response."""
    return F.pad(view.completion_mask[:, 1:], (0, 1))


@dataclass
class Loop:
    """loss(student, batch), part by part.

    ask:  how the teacher is called; read: how the student is
    mask: view -> [B, T], the positions whose logits are compared
    soft: (student's, teacher's) logits, divided by T -> [N] or [N, V]
    mean: ([N], batch, logits [B, T, V]) -> scalar
    """

    teacher: torch.nn.Module
    objective: Objective
    ask: Callable = lambda model, batch: call(model, batch.teacher)
    read: Callable = lambda model, batch: call(model, batch.student)
    mask: Callable = shifted
    teacher_mask: Callable | None = None
    soft: Callable = forward
    mean: Callable = lambda x, batch, logits: x.sum() / len(x)
    scale: Callable = lambda t: t**2
    temperatures: Callable = lambda t: (t, t)
    hard: Callable = lambda s, ids, t: F.cross_entropy(s, ids, reduction="none")
    weights: Callable = lambda hard_weight: (1 - hard_weight, hard_weight)
    no_grad: bool = True
    views: tuple[str, str] = ("student", "teacher")

    def __call__(self, student, batch):
        t = self.objective.temperature
        logits = self.read(student, batch)
        with torch.set_grad_enabled(not self.no_grad):
            answer = self.ask(self.teacher, batch)
        views = [getattr(batch, side) for side in self.views]
        s = logits[self.mask(views[0])]
        p = answer[(self.teacher_mask or self.mask)(views[1])]
        t_s, t_p = self.temperatures(t)
        soft, hard = self.weights(self.objective.hard_weight)
        total = soft * self.scale(t) * self.soft(s / t_s, p / t_p)
        if hard:
            total = total + hard * self.hard(s, batch.response_ids, t)
        return self.mean(total, batch, logits)


def rebuilt(batch: PairedBatch, teacher: View, student: View, **changes) -> PairedBatch:
    """A batch of other views, unproven."""
    targets = student.completion_mask[:, 1:]
    labels = {
        "response_ids": student.input_ids[:, 1:][targets],
        "row_ids": targets.nonzero()[:, 0],
    }
    return replace(batch, teacher=teacher, student=student, **labels | changes)


def remasked(batch: PairedBatch, change) -> PairedBatch:
    """change(view) -> another completion mask, on both sides."""
    views = (
        replace(view, completion_mask=change(view))
        for view in (batch.teacher, batch.student)
    )
    return rebuilt(batch, *views)


# --- The batch ------------------------------------------------------------------------


@fault(
    "misaligned_responses",
    name="rows paired by count",
    seen="ms-swift; modelscope/ms-swift#10073",
)
def _(b):
    view = b.batch.teacher
    parts = (view.input_ids, view.attention_mask, view.completion_mask)
    teacher = View(*(x.roll(1, 0) for x in parts))
    batch = rebuilt(b.batch, teacher, b.batch.student)
    return b.loop(batch=batch)


@fault(
    "mask_covers_padding",
    name="mask from ids that are never -100",
    seen="huggingface/trl#7024",
)
def _(b):
    def change(view):
        return view.completion_mask.cumsum(1) > 0

    return b.whole(batch=remasked(b.batch, change))


@fault(
    "mask_covers_prompt",
    name="no mask of the prompt",
    seen="MakazhanAlpamys/Soup#682",
)
def _(b):
    def change(view):
        mask = view.attention_mask.clone()
        mask[:, 0] = False
        return mask

    batch = remasked(b.batch, change)
    return b.whole(batch=batch, examples=b.examples)


@fault("mask_too_short", name="a prompt counted too long")
def _(b):
    def change(view):
        return view.completion_mask & view.completion_mask.roll(1, 1)

    return b.whole(batch=remasked(b.batch, change), examples=b.examples)


def without_end(view):
    return view.completion_mask & view.completion_mask.roll(-1, 1)


@fault(
    "no_end_token", name="padding masked by id, pad = eos", seen="huggingface/trl#6357"
)
def _(b):
    return b.whole(batch=remasked(b.batch, without_end))


@fault(
    "no_end_token",
    name="padding masked by id, pad = eos, with the examples",
    seen="huggingface/trl#6357",
)
def _(b):
    return b.whole(batch=remasked(b.batch, without_end), examples=b.examples)


@fault(
    "padding_in_response",
    name="padding copied into the response",
    seen="modelscope/ms-swift#9145",
)
def _(b):
    most = max(len(pair.response_ids) for pair in b.pairs)
    pad = b.tokenizer.pad_token_id
    pairs = [
        replace(p, response_ids=p.response_ids + [pad] * (most - len(p.response_ids)))
        for p in b.pairs
    ]
    return b.whole(batch=b.collator.collate(pairs))


@fault(
    "truncated_teacher_context",
    name="the student's limit for the teacher",
    seen="huggingface/trl#5862",
)
def _(b):
    length = max(len(p.teacher_prompt_ids + p.response_ids) for p in b.pairs) - 3
    collator = PairCollator(
        b.tokenizer, teacher_max_length=length, student_max_length=length
    )
    return b.whole(batch=collator(b.examples), collator=collator)


@fault(
    "truncated_teacher_context",
    name="teacher's prompt cut on the left by other code",
    seen="huggingface/trl#5862",
)
def _(b):
    longest = max(len(p.teacher_prompt_ids) for p in b.pairs)
    pairs = [
        replace(p, teacher_prompt_ids=p.teacher_prompt_ids[-(longest - 3) :])
        for p in b.pairs
    ]
    return b.whole(batch=b.collator.collate(pairs), examples=b.examples)


@fault("truncated_student_context", name="a tag that finds no room")
def _(b):
    examples = [replace(e, simplified_context=e.context) for e in b.examples]
    pairs = [b.collator.encode(e, i) for i, e in enumerate(examples)]
    length = max(len(p.student_prompt_ids + p.response_ids) for p in pairs) - 3
    collator = PairCollator(b.tokenizer, student_max_length=length)
    return b.whole(batch=collator(examples), collator=collator)


def retemplated(b, template):
    tokenizer = copy.deepcopy(b.tokenizer)
    tokenizer.chat_template = template
    return tokenizer


PROSE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@fault(
    "wrong_template",
    name="the student's template for the teacher",
    seen="thinking-machines-lab/tinker-cookbook#797",
)
def _(b):
    ours = models.CHAT_TEMPLATE.replace("<|context|>", "<|input|>")
    ours = retemplated(b, ours)
    collator = PairCollator(ours, teacher_tokenizer=b.tokenizer)
    batch = PairCollator(ours)(b.examples)
    return b.whole(batch=batch, collator=collator, examples=b.examples)


@fault(
    "retokenised_boundary",
    name="prompt and response tokenised as one text",
    seen="huggingface/trl#5461",
)
def _(b):
    tokenizer = retemplated(b, PROSE)
    collator = PairCollator(tokenizer)
    examples = [
        replace(e, context="", response="value " + e.response) for e in b.examples
    ]
    pairs = []
    for i, e in enumerate(examples):
        prompt = collator.teacher_side.render("", e.user_input)
        ids = tokenizer(prompt + e.response, add_special_tokens=False).input_ids
        n = len(collator.encode(e, i).teacher_prompt_ids)
        end = [tokenizer.eos_token_id]
        pairs.append(EncodedPair(i, ids[:n], ids[:n], ids[n:] + end))
    batch = collator.collate(pairs)
    settings = {"objective": Objective(hard_weight=1.0), "teacher": None}
    return b.whole(batch=batch, collator=collator, examples=examples, **settings)


@fault("not_the_example", name="example numbers of another order")
def _(b):
    batch = replace(b.batch, example_ids=b.batch.example_ids.flip(0))
    return b.whole(batch=batch, examples=b.examples)


@fault("labels_differ", name="labels shifted although the selection shifts")
def _(b):
    batch = replace(b.batch, response_ids=b.batch.response_ids.roll(-1))
    return b.whole(batch=batch)


# --- What the models read -------------------------------------------------------------


@fault("teacher_reads_simplified_input", name="one tensor of ids for both models")
def _(b):
    return b.loop(
        ask=lambda m, batch: call(m, batch.student), views=("student", "student")
    )


@fault("student_reads_full_input", name="the student trained on D, not on D'")
def _(b):
    return b.loop(
        read=lambda m, batch: call(m, batch.teacher), views=("teacher", "teacher")
    )


@fault("attention_hides_tokens", name="attention mask from ids != pad, pad in the text")
def _(b):
    pad = b.tokenizer.convert_tokens_to_ids(models.INPUT)

    def read(model, batch):
        ids = batch.student.input_ids
        return model(input_ids=ids, attention_mask=(ids != pad).long()).logits

    return b.loop(read=read)


@fault("student_reads_other_input", name="rows packed into one")
def _(b):
    def read(model, batch):
        view = batch.student
        logits = model(input_ids=view.input_ids[view.attention_mask][None]).logits[0]
        out = logits.new_zeros(*view.input_ids.shape, logits.shape[-1])
        out[view.attention_mask] = logits
        return out

    return b.loop(read=read)


@fault("teacher_reads_other_input", name="a token put before the teacher's prompt")
def _(b):
    def ask(model, batch):
        view = batch.teacher
        ids = F.pad(view.input_ids, (1, 0), value=b.tokenizer.eos_token_id)
        mask = F.pad(view.attention_mask.long(), (1, 0), value=1)
        return model(input_ids=ids, attention_mask=mask).logits[:, 1:]

    return b.loop(ask=ask)


def moved_left(model, batch, mask: bool):
    """The student's rows padded on the left, and its logits moved back."""
    view = batch.student
    gaps = [int(n) for n in (~view.attention_mask).sum(1)]

    def moved(rows, sign):
        pairs = zip(rows, gaps, strict=True)
        return torch.stack([x.roll(sign * gap, 0) for x, gap in pairs])

    ids, real = moved(view.input_ids, 1), moved(view.attention_mask, 1).long()
    places = (real.cumsum(1) - 1).clamp_min(0)
    given = real if mask else None
    logits = model(input_ids=ids, attention_mask=given, position_ids=places).logits
    return moved(logits, -1)


@fault("attention_sees_padding", name="padding on the left, no attention mask")
def _(b):
    return b.loop(read=lambda model, batch: moved_left(model, batch, mask=False))


# --- The teacher ----------------------------------------------------------------------


class Within(torch.nn.Module):
    """A model whose last part is another's."""

    def __init__(self, model, head):
        super().__init__()
        self.model, self.head = model, head

    def forward(self, input_ids, attention_mask=None, **_):
        hidden = self.model.model(input_ids, attention_mask).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden))


@fault("teacher_shares_weights", name="teacher and student under one head")
def _(b):
    other = models.build(b.tokenizer, hidden_size=32, layers=1, heads=2, seed=1)
    return b.loop(teacher=Within(other, b.student.lm_head))


def from_disk(b, by):
    """Logits that were stored, as many positions late."""
    logits = LiveTeacher(b.teacher).targets(b.batch).roll(by, 0)
    return SimpleNamespace(targets=lambda batch: logits)


@fault("teacher_shifted", name="stored logits one position late")
def _(b):
    return b.whole(teacher=from_disk(b, 1))


@fault("teacher_shifted", name="stored top k one position early")
def _(b):
    logits = LiveTeacher(b.teacher).targets(b.batch).roll(-1, 0)
    targets = top_k_targets(logits, 16)
    return b.whole(teacher=SimpleNamespace(targets=lambda batch: targets))


@fault("teacher_in_train_mode", name="teacher in train mode")
def _(b):
    teacher = copy.deepcopy(b.teacher)
    for layer in teacher.model.layers:
        layer.self_attn.attention_dropout = 0.2
    return b.loop(teacher=teacher.train())


@fault("teacher_gets_gradient", name="the teacher is trained along")
def _(b):
    return b.loop(no_grad=False)


@fault(
    "teacher_unused",
    name="the soft term is computed and not added",
    seen="NousResearch/atropos#456",
)
def _(b):
    return b.loop(Objective(temperature=2.0, hard_weight=0.3), weights=lambda w: (0, 1))


@fault("teacher_unused", name="labels in place of a teacher that is never asked")
def _(b):
    def loss(student, batch):
        return F.cross_entropy(
            batch.student.select(call(student, batch.student)), batch.response_ids
        )

    return b.whole(loss=loss)


def of_tokens(estimate):
    """A loss of the response tokens' log-probabilities (log p_s, log p_t)."""

    def loss(b):
        ids = b.batch.response_ids[:, None]

        def soft(s, t):
            log_ps, log_pt = (x.log_softmax(-1).gather(-1, ids)[:, 0] for x in (s, t))
            return estimate(log_ps, log_pt)

        return b.loop(Objective("reverse_kl"), soft=soft)

    return loss


fault(
    "teacher_moves_value_only",
    name="k1 back-propagated",
    seen="verl refuses it",
)(of_tokens(lambda s, t: s - t))


@fault(
    "unexpected_start",
    name="teacher's prompt without the mark of an answer",
    seen="siyan-zhao/OPSD#10",
)
def _(b):
    pairs = [replace(p, teacher_prompt_ids=p.teacher_prompt_ids[:-1]) for p in b.pairs]
    return b.whole(batch=b.collator.collate(pairs))


class Padded(torch.nn.Module):
    """A model whose output head has columns that are no tokens."""

    def __init__(self, model, columns: int, logit: float, level: float = 0.0):
        super().__init__()
        self.model, self.columns = model, columns
        self.logit, self.level = logit, level

    def forward(self, input_ids, attention_mask=None, **_):
        logits = self.model(input_ids, attention_mask).logits + self.level
        return SimpleNamespace(
            logits=F.pad(logits, (0, self.columns), value=self.logit)
        )


@fault("padded_columns_have_mass", name="untrained columns of a padded head")
def _(b):
    return b.loop(
        teacher=Padded(b.teacher, 24, 9.0), student=Padded(b.student, 24, 0.0)
    )


class Sparse:
    """A teacher that gives its k likeliest tokens."""

    def __init__(self, b, k, tail, temperature=1.0):
        self.live = LiveTeacher(b.teacher)
        self.settings = k, tail, temperature

    def targets(self, batch) -> SparseTargets:
        k, tail, temperature = self.settings
        logits = self.live.targets(batch)
        return top_k_targets(logits, k, tail, temperature=temperature)


@fault("teacher_mass_low", name="k too small for the temperature")
def _(b):
    return b.whole(
        teacher=Sparse(b, 4, "bucket", 4.0), objective=Objective(temperature=4.0)
    )


@fault("top_k_renormalised", name='tail="renormalize"')
def _(b):
    return b.whole(teacher=Sparse(b, 8, "renormalize"))


@fault("top_k_tail_cut", name='tail="zero"')
def _(b):
    return b.whole(
        teacher=Sparse(b, 32, "zero", 2.0), objective=Objective(temperature=2.0)
    )


def best(k, renormalise):
    """Forward KL on the teacher's k best tokens."""

    def soft(s, t):
        values, ids = t.log_softmax(-1).topk(k)
        ours = s.log_softmax(-1).gather(-1, ids)
        if renormalise:
            values, ours = values.log_softmax(-1), ours.log_softmax(-1)
        return kl(values, ours)

    return soft


@fault(
    "top_k_renormalised",
    name="both sides renormalised on the top k",
    seen="ms-swift, NVIDIA ModelOpt, axolotl",
)
def _(b):
    return b.loop(soft=best(8, True))


@fault(
    "top_k_tail_cut",
    name="forward KL cut off after the top k",
    seen="verl-project/verl#5041",
)
def _(b):
    return b.loop(soft=best(8, False))


# --- Positions ------------------------------------------------------------------------


@fault(
    "no_gradient",
    name="the teacher's logits on both sides",
    seen="labmlai/annotated_deep_learning_paper_implementations#66",
)
def _(b):
    return b.loop(soft=lambda s, t: forward(0 * s + t, t))


@fault("no_gradient", name="the student under no_grad")
def _(b):
    def read(model, batch):
        with torch.no_grad():
            return call(model, batch.student)

    return b.loop(read=read)


@fault(
    "label_shift",
    name="the mask on logits that are not shifted",
    seen="arcee-ai/DistillKit",
)
def _(b):
    return b.loop(mask=lambda view: view.completion_mask)


@fault("labels_shifted_twice", name="labels shifted, then shifted again")
def _(b):
    return b.loop(mask=lambda view: F.pad(view.completion_mask[:, 2:], (0, 2)))


@fault(
    "first_token_dropped",
    name="logits sliced at the response",
    seen="TRL's ULD loss, where the end is dropped as well",
)
def _(b):
    return b.loop(mask=lambda view: view.completion_mask & shifted(view))


@fault(
    "end_token_dropped",
    name="the end token is not in the loss",
    seen="huggingface/trl#6357",
)
def _(b):
    return b.loop(mask=lambda view: F.pad(without_end(view)[:, 1:], (0, 1)))


@fault(
    "tokens_without_gradient",
    name="a negative sum over the top k, clamped at 0",
    seen="verl-project/verl#7856",
)
def _(b):
    student = Sharper(b.teacher)
    soft = best(8, False)
    return b.loop(
        Objective(temperature=6.0),
        student=student,
        batch=b.plain,
        soft=lambda s, t: soft(s, t).clamp_min(0),
    )


class Sharper(torch.nn.Module):
    """The teacher, surer on every second row, less sure on the others."""

    def __init__(self, teacher):
        super().__init__()
        self.model = copy.deepcopy(teacher)

    def forward(self, input_ids, attention_mask=None, **_):
        factor = torch.tensor([1.4, 0.7]).repeat(len(input_ids))[: len(input_ids)]
        logits = self.model(input_ids, attention_mask).logits
        return SimpleNamespace(logits=logits * factor[:, None, None])


@fault(
    "prompt_in_loss",
    "padding_in_loss",
    name="neither mask nor shift",
    seen="MakazhanAlpamys/Soup#682",
)
def _(b):
    return b.loop(batch=b.plain, mask=lambda view: torch.ones_like(view.attention_mask))


@fault("prompt_in_loss", name="the attention mask in place of the response's")
def _(b):
    return b.loop(
        batch=b.plain, mask=lambda view: F.pad(view.attention_mask[:, 1:], (0, 1))
    )


@fault(
    "padding_in_loss", name="all that follows is response", seen="huggingface/trl#7024"
)
def _(b):
    return b.loop(batch=b.plain, mask=lambda view: shifted(view).cumsum(1) > 0)


# --- Scale ----------------------------------------------------------------------------


@fault(
    "t2_missing",
    name="T^2 left out",
    seen="TropComplique/knowledge-distillation-keras#2",
)
def _(b):
    return b.loop(scale=lambda t: 1.0)


@fault(
    "t2_missing", name="T^2 left out beside hard labels", seen="keras-team/keras-io#869"
)
def _(b):
    return b.loop(Objective(temperature=2.0, hard_weight=0.3), scale=lambda t: 1.0)


@fault("t_for_t2", name="T in place of T^2")
def _(b):
    return b.loop(scale=lambda t: t)


@fault("t2_squared", name="T^2 twice")
def _(b):
    return b.loop(scale=lambda t: t**4)


@fault("t2_undeclared", name="T^2 where none is declared")
def _(b):
    return b.loop(Objective(temperature=2.0, scale_by_t2=False))


def wide_mean(x, batch, logits):
    """x: [N, V], the terms of the divergence"""
    return x.mean()


def terms(s, t):
    log_p, log_q = t.log_softmax(-1), s.log_softmax(-1)
    return log_p.exp() * (log_p - log_q)


@fault(
    "mean_over_vocabulary",
    name="torch's mean",
    seen="haitongli/knowledge-distillation-pytorch#2, NVIDIA ModelOpt",
)
def _(b):
    return b.loop(soft=terms, mean=lambda x, batch, logits: x.mean())


@fault(
    "mean_over_vocabulary",
    name="divided by positions and vocabulary",
    seen="huggingface/trl#4105",
)
def _(b):
    return b.loop(mean=lambda x, batch, logits: x.sum() / logits.numel())


@fault("divided_by_rows", name="batchmean of a tensor [B, T, V]")
def _(b):
    return b.loop(mean=lambda x, batch, logits: x.sum() / len(logits))


@fault(
    "padding_in_denominator",
    name="the mean of a masked tensor",
    seen="huggingface/trl#7024",
)
def _(b):
    return b.loop(mean=lambda x, batch, logits: x.sum() / logits[..., 0].numel())


@fault("sum_for_mean", name="a sum")
def _(b):
    return b.loop(mean=lambda x, batch, logits: x.sum())


@fault("wrong_sign", name="the sign")
def _(b):
    return b.loop(scale=lambda t: -(t**2))


@fault("wrong_scale", name="times the world size")
def _(b):
    return b.loop(scale=lambda t: 8 * t**2)


# --- Another loss ---------------------------------------------------------------------


def row_means(x, batch, logits):
    rows = [x[batch.row_ids == row].mean() for row in range(len(logits))]
    return torch.stack(rows).mean()


@fault(
    "sequence_mean_for_token_mean",
    name="means of rows averaged",
    seen="pytorch/torchtune#1865",
)
def _(b):
    return b.loop(mean=row_means)


@fault("token_mean_for_sequence_mean", name="tokens averaged")
def _(b):
    return b.loop(Objective(temperature=2.0, reduction="sequence_mean"))


def in_micro_batches(b, combine):
    inner = b.loop()
    whole = inner["loss"]

    def loss(student, batch):
        parts = (b.pairs[:2], b.pairs[2:])
        return combine([whole(student, b.collator.collate(part)) for part in parts])

    return inner | {"loss": loss}


@fault(
    "micro_batch_means",
    name="means of micro-batches averaged",
    seen="huggingface/trl#4719",
)
def _(b):
    return in_micro_batches(b, lambda parts: sum(parts) / len(parts))


@fault(
    "micro_batches_added",
    name="means of micro-batches added",
    seen="MakazhanAlpamys/Soup#720",
)
def _(b):
    return in_micro_batches(b, sum)


MIXED = Objective(temperature=2.0, hard_weight=0.3)


@fault("hard_weight_swapped", name="alpha is the other one's weight")
def _(b):
    return b.loop(MIXED, weights=lambda w: (w, 1 - w))


@fault("hard_weight_ignored", name="the labels are not added")
def _(b):
    return b.loop(MIXED, weights=lambda w: (1 - w, 0.0))


@fault("hard_labels_softened", name="the cross-entropy at T")
def _(b):
    return b.loop(
        MIXED, hard=lambda s, ids, t: F.cross_entropy(s / t, ids, reduction="none")
    )


@fault("t2_on_hard_labels", name="T^2 on the whole loss")
def _(b):
    return b.loop(
        MIXED,
        hard=lambda s, ids, t: t**2 * F.cross_entropy(s, ids, reduction="none"),
    )


@fault("terms_scaled", name="1 - hard_weight applied twice")
def _(b):
    return b.loop(MIXED, weights=lambda w: ((1 - w) ** 2, w))


@fault("terms_scaled", name="a sum of soft terms beside a mean of hard ones")
def _(b):
    return b.loop(MIXED, soft=lambda s, t: len(s) * forward(s, t))


@fault("tokens_weighted", name="tokens weighted by the teacher's confidence")
def _(b):
    return b.loop(soft=lambda s, t: forward(s, t) * t.softmax(-1).amax(-1))


@fault("temperature_inverted", name="logits times T")
def _(b):
    return b.loop(temperatures=lambda t: (1 / t, 1 / t))


@fault("temperature_twice", name="the teacher's logits come divided already")
def _(b):
    return b.loop(temperatures=lambda t: (t, t**2))


@fault("temperature_twice", name="both come divided already")
def _(b):
    return b.loop(temperatures=lambda t: (t**2, t**2))


@fault("another_divergence", name="the squared difference of logits")
def _(b):
    return b.loop(soft=lambda s, t: ((s - t) ** 2).mean(-1))


@fault("another_divergence", name="the squared difference of probabilities")
def _(b):
    return b.loop(soft=lambda s, t: (s.softmax(-1) - t.softmax(-1)).square().sum(-1))


@fault("direction_swapped", name="arguments swapped", seen="paiml/aprender#2153")
def _(b):
    return b.loop(soft=lambda s, t: forward(t, s))


@fault("direction_swapped", name="forward KL where reverse is declared")
def _(b):
    return b.loop(Objective("reverse_kl", temperature=2.0))


def jsd(s, t):
    s, t = s.log_softmax(-1), t.log_softmax(-1)
    m = torch.stack([s, t]).logsumexp(0) - torch.tensor(2.0).log()
    return 0.5 * (kl(t, m) + kl(s, m))


@fault("another_divergence", name="JSD by default", seen="huggingface/trl#5731")
def _(b):
    return b.loop(soft=jsd)


@fault("temperature_on_one_side", name="the teacher alone is softened")
def _(b):
    return b.loop(temperatures=lambda t: (1.0, t))


@fault("temperature_on_one_side", name="the student alone is softened")
def _(b):
    return b.loop(temperatures=lambda t: (t, 1.0))


@fault(
    "temperature_ignored",
    name="the temperature is not passed on",
    seen="huggingface/trl#6847",
)
def _(b):
    return b.loop(temperatures=lambda t: (1.0, 1.0))


@fault(
    "probabilities_for_logs",
    name="softmax for log_softmax",
    seen="microsoft/ProDA#20",
)
def _(b):
    return b.loop(soft=lambda s, t: -(t.softmax(-1) * s.softmax(-1)).sum(-1))


@fault("clamped_log_probs", name="log-probabilities clamped at -10", seen="verl")
def _(b):
    student = copy.deepcopy(b.student)
    with torch.no_grad():
        student.lm_head.weight.mul_(2.0)

    def soft(s, t):
        return -(t.softmax(-1) * s.log_softmax(-1).clamp_min(-10)).sum(-1)

    return b.loop(Objective(), student=student, soft=soft)


@fault("softmax_twice", name="the teacher's probabilities as logits")
def _(b):
    return b.loop(soft=lambda s, t: forward(s, t.softmax(-1)))


@fault("softmax_twice", name="the student's probabilities as logits")
def _(b):
    return b.loop(soft=lambda s, t: forward(s.softmax(-1), t))


@fault("argmax_for_distribution", name="the teacher's likeliest token")
def _(b):
    return b.loop(soft=lambda s, t: F.cross_entropy(s, t.argmax(-1), reduction="none"))


@fault(
    "teacher_shifted", name="the teacher one position late", seen="siyan-zhao/OPSD#10"
)
def _(b):
    return b.loop(teacher_mask=lambda view: view.completion_mask)


@fault("teacher_shifted", name="one slice for prompts of unlike length")
def _(b):
    mask = shifted(b.batch.student)
    narrow = b.batch.teacher.input_ids.shape[1] - mask.shape[1]
    return b.loop(teacher_mask=lambda view: F.pad(mask, (0, narrow)))


def filled_up(s, t, value=0.0):
    size = max(s.shape[-1], t.shape[-1])
    return forward(*(F.pad(x, (0, size - x.shape[-1]), value=value) for x in (s, t)))


@fault("vocabulary_padded", name="the student filled up with 0", seen="Liger-Kernel")
def _(b):
    return b.loop(
        Objective(), teacher=Padded(b.teacher, 24, -30.0, -15.0), soft=filled_up
    )


@fault("vocabulary_padded", name="the teacher filled up")
def _(b):
    return b.loop(
        Objective(),
        student=Padded(b.student, 24, 0.0),
        soft=lambda s, t: filled_up(s, t, -2.0),
    )


@fault("sampled_token_only", name="one token where a divergence is declared")
def _(b):
    inner = of_tokens(lambda s, t: (s - t).detach() * s)(b)
    return inner | {"objective": Objective("forward_kl")}


fault(
    "k3_gradient",
    name="k3 back-propagated",
    seen="verl's documentation; pytorch/rl#4038",
)(of_tokens(lambda s, t: (t - s).exp() - 1 - (t - s)))


@fault("low_precision", name="log_softmax in bfloat16", seen="Liger-Kernel")
def _(b):
    return b.loop(soft=lambda s, t: forward(s.bfloat16(), t.bfloat16()).float())


@fault("low_precision", name="log_softmax in float16")
def _(b):
    return b.loop(soft=lambda s, t: forward(s.half(), t.half()).float())


@fault("unexplained_gradient", name="labels smoothed by 2 %")
def _(b):
    def soft(s, t):
        p = 0.98 * t.softmax(-1) + 0.02 / t.shape[-1]
        return -(p * s.log_softmax(-1)).sum(-1)

    return b.loop(soft=soft)


@fault("unexplained_gradient", name="an entropy bonus for the student")
def _(b):
    def soft(s, t):
        log_ps = s.log_softmax(-1)
        return forward(s, t) + 0.1 * (log_ps.exp() * log_ps).sum(-1)

    return b.loop(soft=soft)


@fault("unexplained_gradient", name="a teacher that is smoothed")
def _(b):
    def soft(s, t):
        p = 0.6 * t.softmax(-1) + 0.4 / t.shape[-1]
        return -(p * s.log_softmax(-1)).sum(-1)

    return b.loop(soft=soft)


@fault("loss_not_finite", name="exp, then log", seen="linkedin/Liger-Kernel#769")
def _(b):
    def soft(s, t):
        p, q = (100 * t).softmax(-1), (100 * s).softmax(-1)
        return (p * (p.log() - q.log())).sum(-1)

    return b.loop(soft=soft)


# --- Healthy --------------------------------------------------------------------------


@healthy("ordinary distillation")
def _(b):
    examples = [replace(e, context="") for e in b.examples]
    return b.whole(batch=b.plain, examples=examples)


@healthy("context distillation")
def _(b):
    return b.whole(examples=b.examples)


@healthy("T = 4, with hard labels")
def _(b):
    return b.whole(objective=Objective(temperature=4.0, hard_weight=0.3))


@healthy("hard labels")
def _(b):
    return b.whole(objective=Objective(hard_weight=1.0), teacher=None)


@healthy("reverse KL, sequence mean")
def _(b):
    return b.whole(objective=Objective("reverse_kl", reduction="sequence_mean"))


@healthy("JSD, a sum")
def _(b):
    beta = {"beta": 0.3}
    objective = Objective("generalized_jsd", reduction="sum", divergence_params=beta)
    return b.whole(objective=objective)


@healthy("top-k targets with a bucket")
def _(b):
    return b.whole(teacher=Sparse(b, 16, "bucket"))


@healthy("somebody else's loop")
def _(b):
    return b.loop(MIXED)


@healthy("logits prepared before the loss")
def _(b):
    logits = LiveTeacher(b.teacher).targets(b.batch)

    def loss(student, batch):
        return forward(
            batch.student.select(call(student, batch.student)), logits
        ).mean()

    return b.whole(loss=loss)


@healthy("cross-entropy in place of KL: the same gradient")
def _(b):
    return b.loop(soft=lambda s, t: -(t.softmax(-1) * s.log_softmax(-1)).sum(-1))


@healthy("micro-batches, each divided by the count of the step")
def _(b):
    n = len(b.batch.response_ids)
    return in_micro_batches(b, sum) | {
        "loss": lambda student, batch: sum(
            Loop(b.teacher, Objective(temperature=2.0))(student, part)
            * (len(part.response_ids) / n)
            for part in map(b.collator.collate, (b.pairs[:2], b.pairs[2:]))
        )
    }


@healthy("padding on the left")
def _(b):
    return b.loop(read=lambda model, batch: moved_left(model, batch, mask=True))


@healthy("the score function for reverse KL")
def _(b):
    return of_tokens(lambda s, t: (s - t).detach() * s)(b)


@healthy("a student that has learnt all")
def _(b):
    return b.whole(student=copy.deepcopy(b.teacher), batch=b.plain)


@healthy("a student in bfloat16")
def _(b):
    return b.whole(student=copy.deepcopy(b.student).bfloat16())


@healthy("padded heads, both cut")
def _(b):
    return b.whole(
        student=Padded(b.student, 8, 5.0), teacher=Asked(Padded(b.teacher, 24, 9.0))
    )


class Asked:
    """A teacher whose padded columns are cut off before the loss."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def targets(self, batch):
        return batch.teacher.select(call(self.model, batch.teacher))[:, :1024]


def sharper(b, factor):
    student = copy.deepcopy(b.student)
    with torch.no_grad():
        student.lm_head.weight.mul_(factor)
    return student


@healthy("a student of logits in the hundreds")
def _(b):
    return b.whole(student=sharper(b, 20.0))


@healthy("a student of logits in the thousands, JSD")
def _(b):
    return b.whole(student=sharper(b, 200.0), objective=Objective("generalized_jsd"))


@healthy("a sharp student, reverse KL at T = 4")
def _(b):
    objective = Objective("reverse_kl", temperature=4.0)
    return b.whole(student=sharper(b, 20.0), objective=objective)


@healthy("total variation, T = 4, sequence mean")
def _(b):
    objective = Objective("tvd", temperature=4.0, reduction="sequence_mean")
    return b.whole(objective=objective)


@healthy("skew reverse KL beside hard labels, without T^2")
def _(b):
    objective = Objective(
        "skew_reverse_kl", temperature=4.0, hard_weight=0.4, scale_by_t2=False
    )
    return b.whole(objective=objective, batch=b.plain)


@healthy("responses of one token")
def _(b):
    pairs = [replace(p, response_ids=p.response_ids[-1:]) for p in b.pairs]
    return b.whole(batch=b.collator.collate(pairs))


@healthy("a batch of one")
def _(b):
    return b.whole(batch=b.collator(b.examples[:1]), examples=b.examples)


@healthy("the same row four times")
def _(b):
    examples = b.examples[:1] * 4
    return b.whole(batch=b.collator(examples), examples=examples)


@healthy("every second context empty")
def _(b):
    examples = [
        replace(e, context=e.context * (i % 2)) for i, e in enumerate(b.examples)
    ]
    return b.whole(batch=b.collator(examples), examples=examples)


@healthy("stored logits, where they belong")
def _(b):
    return b.whole(teacher=from_disk(b, 0))


@healthy("sampled sparse targets")
def _(b):
    generator = torch.Generator().manual_seed(0)
    logits = LiveTeacher(b.teacher).targets(b.batch)
    targets = sampled_targets(logits, 16, generator=generator)
    return b.whole(teacher=SimpleNamespace(targets=lambda batch: targets))


@healthy("a teacher in bfloat16")
def _(b):
    return b.whole(teacher=LiveTeacher(copy.deepcopy(b.teacher).bfloat16()))


@healthy("frozen weights that both share")
def _(b):
    """As in LoRA with one base: what is shared is not trained."""
    teacher = models.build(b.tokenizer, hidden_size=32, layers=1, heads=2, seed=1)
    teacher.requires_grad_(False)
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 1024, bias=False)
    return b.loop(teacher=teacher, student=Within(teacher, head))


@healthy("first attempts: tokens by chance")
def _(b):
    generator = torch.Generator().manual_seed(0)

    def chance():
        drawn = torch.randint(9, 1024, (11,), generator=generator).tolist()
        return [*drawn, b.tokenizer.eos_token_id]

    pairs = [replace(pair, response_ids=chance()) for pair in b.pairs]
    batch = b.collator.collate(pairs)
    return b.whole(batch=batch, objective=Objective("reverse_kl"))


@healthy("dropout in the student")
def _(b):
    student = copy.deepcopy(b.student)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return b.whole(student=student.train())
