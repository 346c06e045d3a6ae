"""One example, token by token: inputs, distributions, loss and gradient at each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from kdlib.explorers.frame import (
    Explorer,
    mosaic,
    new_figure,
    row_labels,
    shown,
    slider,
)
from kdlib.models import ANSWER, CONTEXT, INPUT
from kdlib.objective import Objective
from kdlib.plots import BLUE, GREY, ORANGE
from kdlib.views import PairedBatch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

TOKENS = 7
LOSSES = ("forward_kl", "reverse_kl", "generalized_jsd", "tvd")
TAIL = 58  # characters of a prompt that are shown, its last ones


def taken(divergence: str, student_logits, teacher_logits, response_ids):
    """[N] the loss of each token and [N, V] the gradient of their sum."""
    leaf = student_logits.detach().double().requires_grad_()
    objective = Objective(divergence, reduction="sum")
    loss = objective(leaf, teacher_logits.double(), response_ids)
    return loss.per_token, torch.autograd.grad(loss.total, leaf)[0]


def microscope(
    tokenizer,
    batch: PairedBatch,
    teacher_logits: Float[Tensor, "N V"],
    student_logits: Mapping[str, Float[Tensor, "N V"]],
) -> Explorer:
    """A batch of one example under the microscope.

    batch:          of one example; both of its views are shown
    teacher_logits: at its response tokens, as batch.teacher.select gives them
    student_logits: {name: the same of a student, as batch.student.select gives them}
    """
    ids, z_t = batch.response_ids, teacher_logits.detach()
    n = len(ids)
    found = {
        (name, loss): taken(loss, z_s, z_t, ids)
        for name, z_s in student_logits.items()
        for loss in LOSSES
    }
    p_t = z_t.double().softmax(-1)
    p_s = {name: z.detach().double().softmax(-1) for name, z in student_logits.items()}
    words = [shown(tokenizer, i) for i in ids.tolist()]
    prompts = {
        side: prompt_text(tokenizer, batch, side) for side in ("teacher", "student")
    }

    shape = {"left": 0.1, "right": 0.98, "top": 0.99, "bottom": 0.12}
    figure = new_figure(4.6, **shape, hspace=0.6, wspace=0.34)
    by_name = mosaic(figure, "tt;mm;lr", height_ratios=[0.6, 1, 2.2])
    top, middle, left, right = (by_name[name] for name in "tmlr")
    texts = [
        top.text(0, row, "", family="monospace", fontsize=8, va="center")
        for row in (1, 0)
    ]
    top.set(xlim=(0, 1), ylim=(-0.6, 1.6))
    top.axis("off")
    columns = middle.bar(range(n), [0.0] * n, color=GREY)
    middle.set_xticks(range(n), [w.strip("'") for w in words], fontsize=9)
    highest = {
        loss: max(float(found[name, loss][0].max()) for name in student_logits)
        for loss in LOSSES
    }
    middle.set(xlim=(-0.6, n - 0.4), ylim=(0, 1.1))
    middle.set_yticks([0, 1])
    middle.set_title(
        "loss of each token (1: the largest of all students)", loc="left", fontsize=10
    )
    rows = np.arange(TOKENS)
    names = row_labels(left, TOKENS)
    theirs = left.barh(rows - 0.2, [0.0] * TOKENS, 0.38, color=BLUE, label="teacher")
    ours = left.barh(rows + 0.2, [0.0] * TOKENS, 0.38, color=ORANGE, label="student")
    left.invert_yaxis()
    left.set(xlim=(0, 1), xlabel="probability")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    again = row_labels(right, TOKENS)
    pushes = right.barh(rows, [0.0] * TOKENS, 0.7, color=ORANGE)
    right.invert_yaxis()
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set(xlim=(-1, 1), xlabel="gradient; below 0: pushed up")

    def draw(student: str, loss: str, token: int) -> str:
        values, gradients = found[student, loss]
        before = tokenizer.decode(ids[:token])
        for text, side in zip(texts, prompts, strict=True):
            prompt = prompts[side][-TAIL:].rjust(TAIL)
            text.set_text(
                f"{side}: {prompt}{before}  >  {tokenizer.decode(ids[token])}".replace(
                    "$", r"\$"
                )
            )
        for i, column in enumerate(columns):
            column.set_height(float(values[i]) / highest[loss])
            column.set_color(ORANGE if i == token else GREY)
        q = p_s[student][token]
        likely = torch.maximum(p_t[token], q).topk(TOKENS).indices.tolist()
        for label, bar, ours_bar, token_id in zip(
            names, theirs, ours, likely, strict=True
        ):
            label.set_text(shown(tokenizer, token_id))
            bar.set_width(float(p_t[token, token_id]))
            ours_bar.set_width(float(q[token_id]))
        strongest = gradients[token].abs().topk(TOKENS).indices.tolist()
        for label, bar, token_id in zip(again, pushes, strongest, strict=True):
            label.set_text(shown(tokenizer, token_id))
            bar.set_width(float(gradients[token, token_id]))
        share = float(values[token] / values.sum())
        up = gradients[token].argmin().item()
        return (
            f"Token {token + 1} of {n}, {tokenizer.decode([int(ids[token])])!r}: the "
            f"teacher gives it {p_t[token, ids[token]]:.3f}, the student "
            f"{q[ids[token]]:.3f}. The loss here is {values[token]:.3f}, {share:.0%} "
            "of the example's. The strongest push up is for "
            f"{tokenizer.decode([up])!r}, {gradients[token, up]:.3f}."
        )

    controls = {
        "student": slider("student", list(student_logits)),
        "loss": slider("loss", LOSSES),
        "token": slider(
            "token",
            [
                (f"{i + 1} {tokenizer.decode([t])!r}", i)
                for i, t in enumerate(ids.tolist())
            ],
            0,
        ),
    }
    return Explorer(
        "microscope",
        "Of which tokens is an example's loss made, and what does each ask for?",
        controls,
        figure,
        [*texts, *columns, *names, *theirs, *ours, *again, *pushes],
        draw,
    )


def prompt_text(tokenizer, batch: PairedBatch, side: str) -> str:
    """What one side reads before the response."""
    view = getattr(batch, side)
    real = view.attention_mask[0] & ~view.completion_mask[0]
    text = tokenizer.decode(view.input_ids[0, real])
    for token, short in ((CONTEXT, "c: "), (INPUT, " z: "), (ANSWER, " y: ")):
        text = text.replace(token, short)
    return text.strip() + " "
