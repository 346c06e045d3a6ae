"""One batch as two models read it, and the proof that both answer the same tokens.

A View is one side's input; a PairedBatch is two views of the same responses. This file
knows where a response stands on each side, and at which position each of its tokens is
predicted. It does not know how a batch is made from texts (pairs.py), nor any loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from kdlib.errors import AlignmentError, ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Int64, Shaped
    from torch import Tensor

    from kdlib.sparse_targets import SparseTargets


@dataclass(frozen=True, eq=False)
class View:
    """One side's input to its model.

    input_ids:       token ids, padded on the right
    attention_mask:  True where a token is real
    completion_mask: True where a token belongs to the response, its end included

    Raises ArgumentError where shapes differ or a mask is not bool (an integer mask
    would select rows by number instead of masking them).
    """

    input_ids: Int64[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]

    def __post_init__(self):
        for name in ("attention_mask", "completion_mask"):
            mask = getattr(self, name)
            if mask.dtype != torch.bool or mask.shape != self.input_ids.shape:
                raise ArgumentError(
                    f"{name} is {mask.dtype} {tuple(mask.shape)}, "
                    f"input_ids has shape {tuple(self.input_ids.shape)}",
                    f"pass {name} as a bool tensor [B, T], for example mask.bool()",
                )

    def select(self, x: Shaped[Tensor, "B T ..."]) -> Shaped[Tensor, "N ..."]:
        """What the model says about each response token, row after row.

        The output at position t predicts the token at t + 1, so the first response
        token is predicted from the last position of the prompt.

        x: logits, hidden states or any other output, one for each input position
        Raises ArgumentError where x does not have the view's B and T.
        """
        if x.shape[:2] != self.input_ids.shape:
            raise ArgumentError(
                f"x has shape {tuple(x.shape)}, the view "
                f"[B, T] = {list(self.input_ids.shape)}",
                "pass the model's output for the whole view, not yet shifted or cut",
            )
        return x.flatten(0, 1).index_select(0, self.positions)

    @cached_property
    def positions(self) -> Int64[Tensor, " N"]:
        """Where in B * T stands the position that predicts each response token.

        The only place where the shift between a token and its prediction is made.
        """
        row, column = self.completion_mask[:, 1:].nonzero(as_tuple=True)
        return row * self.input_ids.shape[1] + column

    @cached_property
    def n_tokens(self) -> int:
        """Real tokens in all rows."""
        return int(self.attention_mask.sum())

    @cached_property
    def padded_at_the_end(self) -> bool:
        """In every row, no real token comes after padding."""
        mask = self.attention_mask
        return not (mask[:, 1:] & ~mask[:, :-1]).any()

    def inputs(self) -> dict[str, Tensor | None]:
        """What a causal language model is called with.

        Without an attention mask where padding is at the end: no real token attends to
        it, and attention that is causal and nothing else has the fastest kernels. (What
        the model says at padding is not selected.)
        """
        mask = None if self.padded_at_the_end else self.attention_mask.long()
        return {"input_ids": self.input_ids, "attention_mask": mask}

    def output_of(self, model):
        """What a causal language model says of the view; a GPU is not waited for."""
        # A cache is for generation; with activation checkpointing it would be wrong.
        with _never_packed():
            return model(**self.inputs(), use_cache=False)

    def map(self, f: Callable[[Tensor], Tensor]) -> View:
        """The view with f(tensor) in the place of every tensor.

        f may move and copy, and must not change a mask: what was found out about the
        masks stays known. On a GPU, finding it out would wait for all its work.
        """
        view = View(*(f(getattr(self, field.name)) for field in fields(self)))
        known = {"n_tokens": self.n_tokens, "padded_at_the_end": self.padded_at_the_end}
        vars(view).update(known, positions=f(self.positions))
        return view

    def to(self, device: torch.device | str) -> View:
        return self.map(lambda x: x.to(device))


@contextmanager
def _never_packed() -> Iterator[None]:
    """Without a mask, transformers asks the GPU whether a row holds several texts one
    after the other, and waits for the answer. No row of ours does."""
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    search = getattr(masking_utils, name, None)
    if search is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, search)


@dataclass(frozen=True, eq=False)
class PairedBatch:
    """Two views of B examples with N response tokens in all.

    response_ids: the token that each selected position has to predict
    row_ids:      the row (0 .. B-1) that each response token belongs to
    example_ids:  the number of each row's example in its data set
    truncated:    tokens that cutting the context saved, (teacher's, student's)
    targets:      what the teacher says of each response token, where that is known
                  before the step
    """

    teacher: View
    student: View
    response_ids: Int64[Tensor, " N"]
    row_ids: Int64[Tensor, " N"]
    example_ids: Int64[Tensor, " B"]
    truncated: Int64[Tensor, "B 2"] | None = None
    targets: SparseTargets | None = None

    @classmethod
    def from_views(
        cls,
        teacher: View,
        student: View,
        example_ids: Int64[Tensor, " B"],
        truncated: Int64[Tensor, "B 2"] | None = None,
    ) -> PairedBatch:
        """Prove that the views hold the same responses, then make the batch.

        Raises AlignmentError with the first row and position at which they differ.
        """
        check_alignment(teacher, student, example_ids)
        targets = student.completion_mask[:, 1:]
        return cls(
            teacher=teacher,
            student=student,
            response_ids=student.input_ids[:, 1:][targets],
            row_ids=targets.nonzero()[:, 0],
            example_ids=example_ids,
            truncated=truncated,
        )

    def map(self, f: Callable[[Tensor], Tensor]) -> PairedBatch:
        """The batch with f(tensor) in the place of every tensor, as View.map."""

        def mapped(part):
            if part is None:
                return None
            return f(part) if isinstance(part, torch.Tensor) else part.map(f)

        return PairedBatch(*(mapped(getattr(self, x.name)) for x in fields(self)))

    def to(self, device: torch.device | str) -> PairedBatch:
        return self.map(lambda x: x.to(device))


def check_alignment(
    teacher: View, student: View, example_ids: Int64[Tensor, " B"]
) -> None:
    """Compare the response tokens of both views, row by row and token by token.

    Equal counts prove nothing: rows (1, 9) and (9, 1) have as many tokens in all on
    either side, and each token would learn from another token's distribution.

    Raises AlignmentError naming row, position and both tokens.
    """
    rows = len(example_ids)
    if not rows == len(teacher.input_ids) == len(student.input_ids):
        raise AlignmentError(
            f"{len(teacher.input_ids)} teacher rows, {len(student.input_ids)} "
            f"student rows and {rows} example ids",
            "build both views from the same examples in the same order",
        )
    for side, view in (("teacher", teacher), ("student", student)):
        if (view.completion_mask & ~view.attention_mask).any():
            raise AlignmentError(
                f"the {side}'s completion_mask covers padding",
                "mask response tokens only; padding is never part of a response",
            )
        if view.completion_mask[:, 0].any():
            raise AlignmentError(
                f"the {side}'s view has a response token in column 0, "
                "which no position predicts",
                "give every row a prompt of one token at least (a bos token, say)",
            )
    for row, example_id in enumerate(example_ids.tolist()):
        teacher_ids, student_ids = (
            view.input_ids[row, view.completion_mask[row]].tolist()
            for view in (teacher, student)
        )
        # zip_longest: where one response is longer, its next token meets a None.
        pairs = enumerate(zip_longest(teacher_ids, student_ids))
        for position, (teacher_id, student_id) in pairs:
            if teacher_id != student_id:
                raise AlignmentError(
                    f"row {row} (example {example_id}), response position "
                    f"{position}: teacher's token is {teacher_id}, student's is "
                    f"{student_id}",
                    "tokenise the response once and give both sides those ids",
                )
