"""The batch itself: alignment, masks, the end of responses, templates, truncation.

No model is run. With the collator and the examples, every row is compared with what
these two make of it; without them, the two views are compared with each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from kdlib.doctor.finding import Finding, found
from kdlib.pairs import PairCollator, PairedExample
from kdlib.prompts import token_ids
from kdlib.views import PairedBatch, View

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

SIDES = ("teacher", "student")


def from_labels(student: Mapping, teacher: Mapping | None = None) -> PairedBatch:
    """A batch as other libraries have it: input_ids, attention_mask, labels.

    labels are as long as the input, not yet shifted, and -100 outside the response.
    Without a teacher's part both sides read the same. Nothing is proven: whether the
    sides fit together is what the doctor is to find out.
    """

    def view(part):
        ids = part["input_ids"]
        attention = part.get("attention_mask")
        attention = torch.ones_like(ids) if attention is None else attention
        return View(ids, attention.bool(), part["labels"] != -100)

    ours = view(student)
    targets = ours.completion_mask[:, 1:]
    return PairedBatch(
        teacher=ours if teacher is None else view(teacher),
        student=ours,
        response_ids=ours.input_ids[:, 1:][targets],
        row_ids=targets.nonzero()[:, 0],
        example_ids=torch.arange(len(ours.input_ids)),
    )


def examine_views(
    batch: PairedBatch,
    collator: PairCollator | None = None,
    examples: Sequence[PairedExample] | None = None,
) -> list[Finding]:
    """Findings that need the batch alone."""
    padded = _mask_on_padding(batch)
    if padded:
        return padded  # all else would follow from it
    findings = []
    if examples is not None and collator is not None:
        findings += _unlike_the_examples(batch, collator, examples)
    if not findings:
        findings += _misaligned(batch)
    if not findings:
        findings += _labels(batch)
        findings += _ends(batch, collator) if collator is not None else []
    if batch.truncated is not None:
        findings += truncated_contexts(batch.truncated, collator)
    return findings


def rows_of(view: View) -> list[list[int]]:
    """The response of each row."""
    pairs = zip(view.input_ids, view.completion_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]


def _mask_on_padding(batch: PairedBatch) -> list[Finding]:
    found_on = []
    for side in SIDES:
        view = getattr(batch, side)
        covered = view.completion_mask & ~view.attention_mask
        if n := int(covered.sum()):
            rows = int(covered.any(1).sum())
            found_on.append(f"{n} positions of padding in {rows} rows ({side}'s view)")
    return [found("mask_covers_padding", "; ".join(found_on))] if found_on else []


def _misaligned(batch: PairedBatch) -> list[Finding]:
    """Row by row and token by token: equal counts prove nothing."""
    teacher, student = rows_of(batch.teacher), rows_of(batch.student)
    differing = [
        (row, position, *tokens)
        for row, pair in enumerate(zip(teacher, student, strict=True))
        for position, tokens in enumerate(zip_longest(*pair))
        if tokens[0] != tokens[1]
    ]
    if not differing:
        return []
    row, position, theirs, ours = differing[0]
    rows = len({row for row, *_ in differing})
    evidence = (
        f"{rows} of {len(student)} rows differ, {sum(map(len, teacher))} tokens in all "
        f"on the teacher's side and {sum(map(len, student))} on the student's; first "
        f"in row {row}, position {position}: teacher's {theirs}, student's {ours}"
    )
    return [found("misaligned_responses", evidence)]


def _labels(batch: PairedBatch) -> list[Finding]:
    """What the loss is told to predict, against the tokens of the view."""
    wanted = [token for row in rows_of(batch.student) for token in row]
    given = batch.response_ids.tolist()
    wrong = sum(a != b for a, b in zip_longest(wanted, given))
    if not wrong:
        return []
    evidence = f"{wrong} of {len(wanted)} response_ids are not the view's tokens"
    return [found("labels_differ", evidence)]


def _ends(batch: PairedBatch, collator: PairCollator) -> list[Finding]:
    end, pad = collator.tokenizer.eos_token_id, collator.tokenizer.pad_token_id
    responses = [row for row in rows_of(batch.student) if row]
    findings = []
    inside = [sum(x in (end, pad) for x in row[:-1]) for row in responses]
    if any(inside):
        evidence = (
            f"{sum(inside)} end or padding tokens before the last one, in "
            f"{sum(map(bool, inside))} of {len(inside)} responses"
        )
        findings.append(found("padding_in_response", evidence))
    if responses and not any(row[-1] == end for row in responses):
        evidence = f"none of {len(responses)} responses ends with token {end}"
        if pad in (None, end):
            evidence += ", which is also the padding token"
        findings.append(found("no_end_token", evidence))
    return findings


def truncated_contexts(
    cut: Int64[Tensor, "E 2"], collator: PairCollator | None = None
) -> list[Finding]:
    """cut: tokens that cutting the context saved, (teacher's, student's)."""
    findings = []
    for column, side in enumerate(SIDES):
        tokens = cut[:, column]
        if not tokens.any():
            continue
        evidence = (
            f"{int((tokens > 0).sum())} of {len(tokens)} examples lost "
            f"{int(tokens.sum())} tokens of context"
        )
        if collator is not None:
            limits = (getattr(collator, f"{s}_side").max_length for s in SIDES)
            evidence += "; max_length is {} for the teacher, {} for the student".format(
                *limits
            )
        findings.append(found(f"truncated_{side}_context", evidence))
    return findings


# --- Against the examples ---


def _unlike_the_examples(batch, collator, examples) -> list[Finding]:
    """Each row against what the collator makes of its example."""
    seen: dict[str, list[str]] = defaultdict(list)
    for row, example_id in enumerate(batch.example_ids.tolist()):
        for side in SIDES:
            view = getattr(batch, side)
            ids = view.input_ids[row, view.attention_mask[row]].tolist()
            mask = view.completion_mask[row, view.attention_mask[row]].tolist()
            name = _fault(side, ids, mask, collator, examples[example_id], example_id)
            if name:
                seen[name].append(f"row {row} ({side}'s view)")
    return [
        found(name, f"{len(where)} rows, the first of them {where[0]}")
        for name, where in seen.items()
    ]


def _fault(side, ids, mask, collator, example, example_id) -> str | None:
    pair = collator.encode(example, example_id)
    other = "student" if side == "teacher" else "teacher"
    prompts = {s: getattr(pair, f"{s}_prompt_ids") for s in SIDES}
    prompt, response = prompts[side], pair.response_ids
    if ids == prompt + response:
        if mask == [False] * len(prompt) + [True] * len(response):
            return None
        if any(mask[: len(prompt)]):
            return "mask_covers_prompt"
        missed = mask[len(prompt) :].count(False)
        return "no_end_token" if missed == 1 and not mask[-1] else "mask_too_short"
    if ids == prompt + response[:-1]:
        return "no_end_token"
    if ids == prompts[other] + response:
        known = {"teacher": "teacher_reads_simplified_input"}
        return known.get(side, "student_reads_full_input")
    context = example.context if side == "teacher" else example.simplified_context
    sides = {s: getattr(collator, f"{s}_side") for s in SIDES}
    room = len(response)
    foreign, _ = sides[other].prompt_ids(context, example.user_input, room, example_id)
    if ids == foreign + response:
        return "wrong_template"
    text = sides[side].render(context, example.user_input) + example.response
    whole = sides[side].bos + token_ids(sides[side].tokenizer, text)
    if ids[: len(whole)] == whole:
        return "retokenised_boundary"
    if ids[-room:] == response and _is_part(ids[:-room], prompt):
        return f"truncated_{side}_context"
    return "not_the_example"


def _is_part(short: list[int], long: list[int]) -> bool:
    """Whether `long` with one piece cut out of it is `short`."""
    if len(short) >= len(long):
        return False
    start = 0
    while start < len(short) and short[start] == long[start]:
        start += 1
    rest = len(short) - start
    return not rest or short[-rest:] == long[-rest:]
