"""The teacher: what it read, in which mode, whether it is used, and what it said."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib.doctor import thresholds
from kdlib.doctor.finding import Finding, found
from kdlib.doctor.positions import examine_attention
from kdlib.doctor.watch import Seen, logits_of, model_of, reading
from kdlib.pairs import PairCollator
from kdlib.sparse_targets import SparseTargets
from kdlib.views import PairedBatch, View

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Answer(NamedTuple):
    """What the loss got from the teacher, or would have got.

    targets: [N, V] logits or SparseTargets; None where there are none
    full:    [B, T, V] the logits of the whole view, where a model is there
    view:    the one that was read
    """

    targets: Float[Tensor, "N V"] | SparseTargets | None
    full: Float[Tensor, "B T V"] | None
    view: View


def examine_teacher(
    teacher, student, batch: PairedBatch, seen: Seen
) -> tuple[list[Finding], Answer]:
    """How the teacher was asked."""
    module, view = model_of(teacher), batch.teacher
    if module is None:
        targets = seen.targets[0] if seen.targets else teacher.targets(batch)
        return [], Answer(targets, None, view)
    findings = _shared(module, student)
    read = reading(view, seen.teacher)
    if read is None and seen.teacher:
        read = reading(batch.student, seen.teacher)
        if read is None:
            rows = seen.teacher[0].ids.shape
            evidence = f"it read {rows[0]} rows of {rows[1]}, and not all of the view's"
            return [found("teacher_reads_other_input", evidence)], Answer(
                None, None, view
            )
        lost = int(view.attention_mask.sum() - batch.student.attention_mask.sum())
        evidence = f"it read the student's rows: {lost} tokens fewer than its own view"
        findings.append(found("teacher_reads_simplified_input", evidence))
        view = batch.student
    if read is not None:
        findings += examine_attention(read, "teacher")
    findings += _mode(module, seen)
    if seen.teacher_gradient > 0:
        evidence = f"a gradient of norm {seen.teacher_gradient:.3g} reaches its logits"
        findings.append(found("teacher_gets_gradient", evidence))
    full = _ask(module, view) if read is None else read.logits
    return findings, Answer(_answer(view.select(full), seen.targets), full, view)


def _shared(module, student) -> list[Finding]:
    """Weights that the optimiser moves under the teacher. Frozen ones may be shared."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    shared = [p for p in module.parameters() if id(p) in trained]
    if not shared:
        return []
    evidence = f"{sum(p.numel() for p in shared):,} trained weights are the teacher's"
    return [found("teacher_shares_weights", evidence)]


def _answer(logits, targets: list):
    """What the loss got, if it is the model's own word on the response tokens, perhaps
    with fewer columns or k entries; else that word, which the loss should have got."""
    given = targets[0] if targets else logits
    if isinstance(given, SparseTargets):
        return given
    width = given.shape[-1]
    same = given.shape == logits[:, :width].shape
    return given if same and torch.allclose(given, logits[:, :width]) else logits


def _mode(module, seen: Seen) -> list[Finding]:
    """Two forward passes that differ are two teachers."""
    call = next((call for call in seen.teacher if call.training), None)
    if call is None:
        return []
    kwargs = {} if call.mask is None else {"attention_mask": call.mask}
    was = module.training
    module.train()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            first, second = (logits_of(module(call.ids, **kwargs)) for _ in range(2))
    finally:
        module.train(was)
    moved = float((first - second).abs().mean() / first.abs().mean())
    if moved <= thresholds.NOISE:
        return []
    evidence = f"two forward passes differ by {moved:.1%} of the logits"
    return [found("teacher_in_train_mode", evidence)]


@torch.no_grad()
def _ask(module, view: View) -> Float[Tensor, "B T V"]:
    was = module.training
    module.eval()
    try:
        mask = view.attention_mask.long()
        return logits_of(module(input_ids=view.input_ids, attention_mask=mask))
    finally:
        module.train(was)


def examine_use(seen: Seen, changed: Seen) -> list[Finding]:
    """The same loss with the teacher's answer turned round: the gradient must move."""
    if not (seen.teacher or seen.targets):
        return []
    if [g.shape for g in seen.gradients] != [g.shape for g in changed.gradients]:
        return []
    whole = sum(float(g.norm()) for g in seen.gradients)
    pairs = zip(seen.gradients, changed.gradients, strict=True)
    moved = sum(float((a - b).norm()) for a, b in pairs)
    if not whole or moved > thresholds.USED * whole:
        return []
    evidence = (
        f"with the teacher's answer turned round the loss goes from {seen.value:.6g} "
        f"to {changed.value:.6g}, and the gradient moves by {moved / whole:.1g} of it"
    )
    same = abs(changed.value - seen.value) <= thresholds.USED * abs(seen.value)
    return [found("teacher_unused" if same else "teacher_moves_value_only", evidence)]


def examine_answer(
    answer: Answer,
    batch: PairedBatch,
    student_logits: Float[Tensor, "N V"],
    collator: PairCollator | None,
) -> list[Finding]:
    """What the teacher said, by itself and beside the student's logits."""
    if answer.targets is None:
        return []
    alien = _neighbours(answer, batch) if answer.full is None else []
    if isinstance(answer.targets, SparseTargets):
        return alien + _sparse(answer.targets, student_logits)
    findings = alien
    log_pt = answer.targets.float().log_softmax(-1)
    tokens = None if collator is None else len(collator.tokenizer)
    if tokens is not None and tokens < log_pt.shape[-1]:
        mass = float(log_pt[:, tokens:].exp().sum(-1).mean())
        if mass > thresholds.DEAD_MASS:
            evidence = (
                f"{log_pt.shape[-1] - tokens} columns beyond the tokenizer's {tokens} "
                f"tokens hold {mass:.3g} of the teacher's probability"
            )
            findings.append(found("padded_columns_have_mass", evidence))
    return findings if alien else findings + _start(log_pt, batch)


def _neighbours(answer: Answer, batch: PairedBatch) -> list[Finding]:
    """Targets that came from a file or a server: are they of these positions?

    They are not where they expect the token before, or after, more than their own: by
    more nats on average than its standard error, and chance, explain.
    """
    ids, rows = batch.response_ids.cpu(), batch.row_ids.cpu()
    targets = answer.targets.to("cpu")

    def surprise(at, tokens):
        if isinstance(targets, SparseTargets):
            log_p = targets.log_probs[at].float()
            log_p = log_p.masked_fill(
                targets.indices[at] != tokens[:, None], -torch.inf
            )
            log_p = log_p.logsumexp(-1)
        else:
            inside = tokens.clamp_max(targets.shape[-1] - 1)
            log_p = (
                targets[at].float().log_softmax(-1).gather(-1, inside[:, None])[:, 0]
            )
        return -log_p.clamp_min(-thresholds.RULED_OUT)

    for by, words in ((-1, "before"), (1, "after")):
        at = torch.arange(len(ids))
        other = (at + by).clamp(0, len(ids) - 1)
        at = at[(rows == rows[other]) & (other != at)]
        if len(at) < 2:
            continue
        gain = surprise(at, ids[at]) - surprise(at, ids[at + by])
        error = float(gain.std()) / len(gain) ** 0.5
        if float(gain.mean()) > thresholds.NEARER_BY + 4 * error:
            evidence = (
                f"the targets expect the token {words} their own more than it, by "
                f"{float(gain.mean()):.1f} nats over {len(at)} tokens (standard error "
                f"{error:.1f})"
            )
            return [found("teacher_shifted", evidence)]
    return []


def _start(log_pt, batch: PairedBatch) -> list[Finding]:
    """-log p_t(y) of the first response tokens against that of the others."""
    first = torch.ones_like(batch.row_ids, dtype=torch.bool)
    first[1:] = batch.row_ids[1:] != batch.row_ids[:-1]
    ids = batch.response_ids
    if first.all() or int(ids.max()) >= log_pt.shape[-1]:
        return []
    surprise = -log_pt.gather(-1, ids[:, None].to(log_pt.device))[:, 0]
    at_first, later = (float(surprise[x].median()) for x in (first, ~first))
    if at_first - later <= thresholds.SURPRISE or later > thresholds.SURPRISE:
        return []
    evidence = (
        f"-log p_t of the response's first token has the median {at_first:.1f} nats, "
        f"of the others {later:.1f}"
    )
    return [found("unexpected_start", evidence)]


def _sparse(targets: SparseTargets, student_logits) -> list[Finding]:
    if targets.weights is not None:
        return []  # sampled: no share of the mass, and no bias
    findings = []
    mass = float(targets.log_probs.double().exp().sum(-1).mean())
    k = targets.indices.shape[-1]
    evidence = f"{k} entries a token hold {mass:.3f} of the teacher's probability"
    if mass < thresholds.TEACHER_MASS:
        findings.append(found("teacher_mass_low", evidence))
    if targets.tail == "zero" and mass < thresholds.CUT_MASS:
        findings.append(found("top_k_tail_cut", evidence))
    if targets.tail == "renormalize":
        p_s = (student_logits.double() / targets.temperature).softmax(-1)
        ours = float(p_s.gather(-1, targets.indices.long()).sum(-1).mean())
        if ours < thresholds.SUPPORT_SHARE * mass:
            evidence += f", and {ours:.3f} of the student's"
            findings.append(found("top_k_renormalised", evidence))
    return findings


def moved_answers(answer: Answer, batch: PairedBatch) -> dict[str, Tensor]:
    """The teacher's logits where they do not belong to the student's tokens."""
    if answer.full is None:
        return {}
    rows, columns = predicted_from(answer.view)
    last = answer.full.shape[1] - 1
    places = {
        "the teacher one position early": columns - 1,
        "the teacher one position late": columns + 1,
        "the teacher at the student's columns": predicted_from(batch.student)[1],
    }
    return {
        words: answer.full[rows, place.clamp(0, last)]
        for words, place in places.items()
    }


def predicted_from(view: View) -> tuple[Tensor, Tensor]:
    rows, columns = view.completion_mask[:, 1:].nonzero(as_tuple=True)
    return rows, columns
