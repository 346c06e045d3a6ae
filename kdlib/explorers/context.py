"""Gain, floor and recovery as a context shrinks: how much of it is lost for good?

The teacher's context is an instruction, `Write it in French, long form.`. The student
is the same network, and reads the first k words of it. Contexts that agree in those
words are one and the same to it, and the best it can do is their mixture
(recovery.best_student).

Everything is measured along one answer, token by token: the KL at token i is the mean
over the contexts that agree, each weighted by Pr(c | y_<i), how well it explains the
answer so far. For these weights the mixture is the best of all students, so nothing
drawn lies below the floor, and none of it is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from kdlib import localize
from kdlib.divergences import forward_kl, tempered_log_softmax
from kdlib.evaluate import response_logits
from kdlib.explorers.frame import (
    Explorer,
    axes_of,
    new_figure,
    slider,
)
from kdlib.pairs import EncodedPair, PairCollator
from kdlib.plots import BLUE, GREY, ORANGE
from kdlib.recovery import best_student
from kdlib.sampling import complete

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LOCALES = ("fr", "de", "es")
CONTEXTS = [localize.instruction(x, form) for x in LOCALES for form in localize.FORMATS]
WORDS = len(CONTEXTS[0].split())
LONGEST = 40  # tokens of an answer


class Shrinking(NamedTuple):
    """Mean KLs [WORDS + 1, L] from the teacher, for k = 0 .. WORDS words.

    tokens: the answer, L of them
    gain:   of the same network without a context
    kl:     of the same network, which reads the first k words
    floor:  of the best student that reads them
    """

    tokens: list[str]
    gain: Float[Tensor, "k L"]
    kl: Float[Tensor, "k L"]
    floor: Float[Tensor, "k L"]


def first_words(context: str, k: int) -> str:
    return " ".join(context.split()[:k])


@torch.no_grad()
def shrinking(teacher, collator: PairCollator, user_input: str, own: int) -> Shrinking:
    """For the teacher's greedy answer after CONTEXTS[own]."""
    kept = [first_words(CONTEXTS[own], k) for k in range(WORDS + 1)]
    prompts = [
        collator.teacher_side.prompt_ids(text, user_input, LONGEST, 0)[0]
        for text in [*CONTEXTS, *kept]
    ]
    (answer,) = complete(
        teacher,
        collator.tokenizer,
        [prompts[own]],
        max_new_tokens=LONGEST,
        keep_end=True,
    )
    rows = [EncodedPair(i, ids, ids, answer) for i, ids in enumerate(prompts)]
    logits = response_logits(teacher, collator.collate(rows), "teacher")
    logits = logits.double().unflatten(0, (len(rows), len(answer)))
    full, short = logits.split([len(CONTEXTS), WORDS + 1])
    ids, found = torch.tensor(answer), []
    for k, text in enumerate(kept):
        alike = torch.tensor([first_words(c, k) == text for c in CONTEXTS])
        best, weights = mixture(tempered_log_softmax(full, 1.0), ids, alike)
        means = [
            (weights * forward_kl(student.expand_as(full), full)).sum(0)
            for student in (short[0], short[k], best)
        ]
        found.append(torch.stack(means))
    tokens = [collator.tokenizer.decode([i]) for i in answer]
    return Shrinking(tokens, *torch.stack(found, 1))


def mixture(log_p, ids, alike):
    """log p* [L, V] of the contexts that are alike, and Pr(c | y_<i) [C, L].

    The mixture of the events "it was context c" is the probability of c: they go in as
    C more columns beside the tokens.
    """
    contexts, length, vocab = log_p.shape
    events = torch.eye(contexts, dtype=log_p.dtype).log()[:, None]
    both = torch.cat([log_p, events.expand(-1, length, -1)], dim=-1)
    best = best_student(both, ids, alike.to(log_p.dtype).log())
    return best[:, :vocab], best[:, vocab:].exp().T


def context(teacher, collator: PairCollator, user_inputs: Sequence[str]) -> Explorer:
    """What the student loses as the instruction shrinks from its end.

    teacher, collator: the shipped ones, or others that know the instructions
    user_inputs:       a few English values
    """
    found = {
        (user_input, number): shrinking(teacher, collator, user_input, number)
        for user_input in user_inputs
        for number in range(len(CONTEXTS))
    }
    ks = range(WORDS + 1)
    shape = {"left": 0.09, "right": 0.98, "top": 0.88, "bottom": 0.21, "wspace": 0.2}
    figure = new_figure(3.4, **shape)
    left, right = axes_of(figure, 1, 2)
    (gain,) = left.plot(ks, [0.0] * len(ks), ":", color="black", label="gain")
    (loss,) = left.plot(ks, [0.0] * len(ks), "s-", color=ORANGE, label="KL")
    (floor,) = left.plot(ks, [0.0] * len(ks), "o-", color=BLUE, label="floor")
    (here,) = left.plot([0.0] * 2, [0.0, 1.0], color=GREY, linewidth=6, alpha=0.35)
    most = max(float(x.kl.sum(-1).max()) for x in found.values())
    left.set_yscale("symlog", linthresh=1)
    left.set(xlim=(-0.3, WORDS + 0.3), ylim=(0, 1.6 * most))
    left.set_yticks([0, 0.5, 1, 10], ["0", "0.5", "1", "10"])
    left.minorticks_off()
    left.set_xlabel("words of the instruction that are read")
    left.set_title("nats an answer (log scale above 1)", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=9, loc="upper right")
    longest = max(len(x.tokens) for x in found.values())
    bars = right.bar(range(longest), [0.0] * longest, 0.8, color=ORANGE, label="KL")
    lows = right.bar(range(longest), [0.0] * longest, 0.4, color=BLUE, label="floor")
    texts = [
        right.text(i, -0.07, "", rotation=60, ha="right", va="top", fontsize=8)
        for i in range(longest)
    ]
    highest = max(float(x.kl.max()) for x in found.values())
    right.set_yscale("symlog", linthresh=1)
    right.set(xlim=(-0.6, longest - 0.4), ylim=(0, 1.6 * highest), xticks=[])
    right.set_yticks([0, 0.5, 1, 10], ["0", "0.5", "1", "10"])
    right.minorticks_off()
    right.set_title("the same, token by token", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=9, loc="upper right")

    def draw(user_input: str, context: int, words: int) -> str:
        one = found[user_input, context]
        gains, totals, floors = (x.sum(-1) for x in (one.gain, one.kl, one.floor))
        gain.set_ydata(gains)
        loss.set_ydata(totals)
        floor.set_ydata(floors)
        here.set_data([words] * 2, [0.0, 1.6 * most])
        for i, (bar, low, text) in enumerate(zip(bars, lows, texts, strict=True)):
            there = i < len(one.tokens)
            bar.set_height(float(one.kl[words, i]) if there else 0.0)
            low.set_height(float(one.floor[words, i]) if there else 0.0)
            token = one.tokens[i].replace("<|", "").replace("|>", "") if there else ""
            text.set_text(token.replace("$", r"\$"))
        kl, left_over = totals[words].item(), floors[words].item()
        begin = first_words(CONTEXTS[context], words)
        alike = sum(first_words(c, words) == begin for c in CONTEXTS)
        said = (
            f"The student reads {begin or 'nothing'!r}, as in {alike} of the "
            f"{len(CONTEXTS)} instructions. Its KL is {kl:.2f} nats for this answer. "
            f"{abs(left_over):.2f} of them no student that reads this can avoid; the "
            f"gain is {gains[words]:.2f}."
        )
        room = gains[words].item() - left_over
        if room > 0.01:
            said += f" Recovery: {1 - (kl - left_over) / room:.2f}."
        return said

    controls = {
        "user_input": slider("request", list(user_inputs)),
        "context": slider("instruction", [(c, i) for i, c in enumerate(CONTEXTS)], 0),
        "words": slider("words that are read", list(ks), 4),
    }
    return Explorer(
        "context",
        "How much of a context is lost for good as it shrinks?",
        controls,
        figure,
        [here, gain, loss, floor, *bars, *lows, *texts],
        draw,
    )
