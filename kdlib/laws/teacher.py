"""Laws of the teacher's side: what is compared with what, and that it stays fixed."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from kdlib.laws.frame import Finding, law, roughly
from kdlib.loss_under_test import NotApplicable, ask, make_batch


@law("14", "paired views hold the same response tokens, row by row")
def paired_identity(loss):
    """Views whose prompts differ are accepted; views whose responses differ, refused.

    Why:  when the teacher sees another prompt, position t of one side is not position t
          of the other. Paired by order, one token too many shifts all that follow, and
          the loss compares the teacher's word 7 with the student's word 8. It still
          falls.
    Bugs: only the number of tokens in the batch is compared, so that errors of two rows
          cancel (ms-swift's extract_active, museum 29); a tokenizer merges across the
          join of prompt and answer (huggingface/trl#5461, museum 28); padding copied
          into the teacher's view (modelscope/ms-swift#9145, museum 30); the teacher
          reads the student's chat template (thinking-machines-lab/tinker-cookbook#797,
          museum 26).
    """
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

    response = [[5, 6, 7], [8, 9]]
    student = view([1, 2], response)
    try:
        loss.pair(*view([4, 3], response), *student)
    except Exception as error:
        shown = f"raises {type(error).__name__}"
        return Finding(shown, "accepted", "refuses equal responses to other prompts")
    for bug, response in {
        "another number of response tokens passes (museum 28)": [[5, 6, 7], [8, 9, 9]],
        "only counted over the batch: errors that cancel pass (museum 29)": [
            [5, 6],
            [7, 8, 9],
        ],
        "only counted: other tokens pass (museum 29)": [[5, 6, 7], [8, 4]],
        "compared as sets: another order passes": [[5, 7, 6], [8, 9]],
    }.items():
        try:
            loss.pair(*view([4, 3], response), *student)
        except Exception:
            continue
        return Finding(f"{response} accepted", "refused", bug)
    return Finding("refused", "refused", None)


@law("15", "the teacher is used, and stays as it was")
def teacher_used(loss):
    """Another teacher gives another gradient; asking changes neither batch nor teacher.

    Of a function that runs the teacher: it does so without dropout and without
    gradient, and its answer follows the teacher's weights.

    Why:  a run in which the teacher is queried, paid for, and never reaches the
          gradient looks like any other run.
    Bugs: the loss is computed and not used (NousResearch/atropos#456, museum 33); the
          teacher moves the number and not the gradient
          (labmlai/annotated_deep_learning_paper_implementations#66); train mode, whose
          dropout is noise in the target; a teacher that is trained along.
    """
    if loss.teacher:
        return _frozen(loss.teacher)
    batch = make_batch(loss)
    before, gradient = ask(loss, batch)
    if not all(map(torch.equal, batch, make_batch(loss))):
        return Finding("changed", "as it was", "the inputs are changed in place")
    after, other = ask(loss, batch._replace(teacher=make_batch(loss, seed=7).teacher))
    moved = float((other - gradient).norm())
    bug = None
    if not moved > 1e-6:
        bug = "the teacher moves the number, not the gradient (labml#66)"
        if roughly(before, after):
            bug = "the teacher is asked and never used (museum 33)"
    note = "the teacher's own mode and weights are not this function's business"
    return Finding(f"moves the gradient by {moved:.2g}", "not 0", bug, note)


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
    with torch.no_grad():
        module.embed.weight.mul_(2)
    other = ask_teacher(module, ids)
    bug = None
    if not torch.equal(first, second):
        bug = "the teacher is left in train mode: its dropout is noise in the target"
    elif first.requires_grad:
        bug = "the teacher's targets carry a gradient: it would be trained"
    elif torch.equal(first, other):
        bug = "the teacher is asked and never used (museum 33)"
    return Finding("frozen" if bug is None else "not frozen", "frozen", bug)
