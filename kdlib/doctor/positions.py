"""Which positions' logits get a gradient, and which should.

The output at position t predicts token t + 1, so the gradient belongs where the next
token is one of the response: from the prompt's last position to the one before the end
token. A mask that is wrong says so here whatever the loss is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.doctor.finding import Finding, found
from kdlib.doctor.watch import Reading, predicting
from kdlib.views import View

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor


def examine_positions(
    view: View, read: Reading, alive: Bool[Tensor, "B T"]
) -> list[Finding]:
    """alive: where the declared loss has a gradient, the response tokens that are not
    learnt to the last bit.
    """
    due = predicting(view)
    measured = read.gradient.abs().amax(-1) > 0
    if not measured.any() and not read.outside:
        if not alive.any():
            return []
        evidence = f"the gradient is zero at all {int(due.sum())} response tokens"
        return [found("no_gradient", evidence)]
    missing, extra = alive & ~measured, measured & ~due
    if not missing.any() and not extra.any() and not read.outside:
        return []
    shown = _shown(view, measured, due)
    if name := _shift(view, measured, due):
        return [found(name, shown)]
    findings = []
    if missing.any():
        n, of = int(missing.sum()), int(due.sum())
        evidence = f"{n} of {of} response tokens get no gradient; {shown}"
        findings.append(found(_left_out(missing, due), evidence))
    prompt = extra & predicting_prompt(view)
    padding = extra & ~prompt
    if prompt.any():
        n = int(prompt.sum())
        evidence = f"{n} positions that predict prompt tokens get gradient; {shown}"
        findings.append(found("prompt_in_loss", evidence))
    if padding.any() or read.outside:
        n = int(padding.sum())
        evidence = f"{n} positions that predict padding get gradient; {shown}"
        if read.outside:
            evidence += f"; at padding itself its norm is {read.outside:.2g}"
        findings.append(found("padding_in_loss", evidence))
    return findings


def examine_attention(read: Reading, side: str) -> list[Finding]:
    """What the attention mask hid and should not have, and the other way round."""
    findings = []
    if read.hidden:
        evidence = f"{read.hidden} tokens of the {side}'s input are masked out"
        findings.append(found("attention_hides_tokens", evidence))
    if read.unhidden:
        evidence = f"{read.unhidden} tokens of padding stand open before {side}'s rows"
        findings.append(found("attention_sees_padding", evidence))
    return findings


def predicting_prompt(view: View) -> Bool[Tensor, "B T"]:
    prompt = predicting(view)
    prompt[:, :-1] = view.attention_mask[:, 1:] & ~view.completion_mask[:, 1:]
    # What stands after a response is no prompt: an end token that was masked, say.
    begun = view.completion_mask.cumsum(1) > 0
    return prompt & ~begun & view.attention_mask


def _shift(view: View, measured, due) -> str | None:
    """The mask moved by one, as it was meant or without what falls off an end."""
    late = view.completion_mask & view.attention_mask
    early = due.new_zeros(due.shape)
    early[:, :-1] = due[:, 1:]
    if (measured == late).all():
        return "label_shift"
    return "labels_shifted_twice" if (measured == early).all() else None


def _left_out(missing, due) -> str:
    count = due.cumsum(1)
    first = due & (count == 1)
    last = due & (count == count[:, -1:])
    # In a row of one token the first is the last: either name would be right.
    if (missing == first).all():
        return "first_token_dropped"
    return "end_token_dropped" if (missing == last).all() else "tokens_without_gradient"


def _shown(view: View, measured, due) -> str:
    """The row where they differ most, for the eye."""
    row = int((measured ^ due).sum(1).argmax())
    seen, wanted = (x[row].nonzero().flatten().tolist() for x in (measured, due))
    return f"row {row}: gradient at {_spans(seen)}, expected at {_spans(wanted)}"


def _spans(positions: list[int]) -> str:
    spans: list[list[int]] = []
    for x in positions:
        if spans and spans[-1][1] == x - 1:
            spans[-1][1] = x
        else:
            spans.append([x, x])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans) or "none"
