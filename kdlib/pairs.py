"""From a pair of inputs to one batch with two views of the same response.

The teacher reads the full input (context c, user input z), the student reads a
simplified one x' = (c', z), and both are asked for the next-token distribution at
every token of the same response y:

    teacher's view:  [ c  z  |  y_1 y_2 ... y_n end ]
    student's view:  [ c' z  |  y_1 y_2 ... y_n end ]

The prompts differ in length, so y starts at another column on each side. This file
knows where, and proves that both sides hold the same response tokens in the same
order. It knows nothing of losses and models. The case c' = c is ordinary
distillation; then both views are equal bit for bit.

Notation: Xiao & Zhu, Foundations of Large Language Models, ch. 3 (arXiv 2501.09223).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from kdlib.errors import AlignmentError, ArgumentError, DataError, ModelError
from kdlib.prompts import PromptSide, check_same_tokenizer, token_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Int64, Shaped
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdlib.sparse import SparseTargets

TRUNCATE_CONTEXT = ("left", "right", "never")


@dataclass(frozen=True)
class PairedExample:
    """One training example, as text: x = (context, user_input) for the teacher,
    x' = (simplified_context, user_input) for the student, one response for both.
    """

    user_input: str
    response: str
    context: str = ""
    simplified_context: str = ""


@dataclass(frozen=True)
class EncodedPair:
    """An example as token ids. The response stands once, so both sides share it.

    truncated_teacher, truncated_student: tokens that cutting the context saved
    """

    example_id: int
    teacher_prompt_ids: list[int]
    student_prompt_ids: list[int]
    response_ids: list[int]
    truncated_teacher: int = 0
    truncated_student: int = 0


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


class PairCollator:
    """Turn PairedExamples into PairedBatches.

    Encode a data set once with `encode(example, number)` and let a DataLoader use
    `collate`; calling the collator with examples does both, and numbers them by
    their place in the call.

    Prompts. Where the tokenizer has a chat template: system = context (left out
    when empty), user = user_input, with the generation prompt, rendered to text and
    tokenised once. A template that refuses or drops system messages gets the
    context on top of the user's message. Without a template: bos (if there is one),
    context, newline (both left out when empty), user_input, newline.

    Templates with a will of their own. Some write today's date (Llama 3.1's asks
    strftime_now): tomorrow the prompts are others, and cached targets and checkpoints
    made from them are refused. Some have switches that nobody sets here (Qwen3's
    enable_thinking). Set both in the template, on both sides, before the first run:

        tokenizer.chat_template = (
            "{% set date_string = '26 Jul 2024' %}" + tokenizer.chat_template
        )  # or "{% set enable_thinking = false %}"

    and save the tokenizer with the model, so that it is served as it was trained.

    Response. Tokenised on its own, then the eos token, then joined to the prompts as
    ids. Tokenising prompt + response as one text could merge tokens across the join,
    differently on each side (see `boundary_differences`). For a model whose turns
    end with another token than eos, set `tokenizer.eos_token` to that one.

    Length. Each side has its own budget, in tokens of prompt + response. Only the
    context is ever shortened: at its "left" or "right" end, or "never" (an error).
    The prompt is then exactly the one that the shorter context would have had.

    Two tokenizers. Ids must mean the same on both sides, so vocabulary, merges,
    added tokens and eos must be equal. Chat templates may differ: each side's prompt
    is rendered with its own, the one that its model was trained on.

    Raises ArgumentError for bad options and ModelError for tokenizers that cannot be
    paired or have no eos token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        teacher_max_length: int = 1024,
        student_max_length: int = 1024,
        truncate_context: str = "left",
    ):
        if truncate_context not in TRUNCATE_CONTEXT:
            raise ArgumentError(
                f"truncate_context={truncate_context!r}",
                f"use one of {', '.join(map(repr, TRUNCATE_CONTEXT))}",
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no eos token, so no response would ever end",
                "set tokenizer.eos_token to the token that ends a turn",
            )
        if teacher_tokenizer is None:
            teacher_tokenizer = tokenizer
        elif teacher_tokenizer is not tokenizer:
            check_same_tokenizer(teacher_tokenizer, tokenizer)
        self.tokenizer = tokenizer
        self.teacher_side = PromptSide(
            "teacher", teacher_tokenizer, teacher_max_length, truncate_context
        )
        self.student_side = PromptSide(
            "student", tokenizer, student_max_length, truncate_context
        )

    def encode(self, example: PairedExample, example_id: int = 0) -> EncodedPair:
        """Token ids of both prompts and of the response with its end token.

        Raises DataError for a field that is not text, for an empty response, for one
        that holds the end token already, and where a side's budget is too small.
        """
        for field in fields(example):
            try:
                str.encode(getattr(example, field.name))
            except (TypeError, UnicodeEncodeError) as error:  # half an emoji, say
                raise DataError(
                    f"example {example_id}: {field.name} is not text: {error}",
                    "pass whole strings; an empty one for nothing",
                ) from error
        response_ids = token_ids(self.tokenizer, example.response)
        if not response_ids:
            raise DataError(
                f"example {example_id}: response {example.response!r} has no tokens",
                "leave out examples without a response",
            )
        if self.tokenizer.eos_token_id in response_ids:
            raise DataError(
                f"example {example_id}: the response holds the end token "
                f"{self.tokenizer.eos_token!r} itself",
                "remove it from the text; the end token is appended here",
            )
        response_ids.append(self.tokenizer.eos_token_id)
        (teacher_ids, teacher_cut), (student_ids, student_cut) = (
            side.prompt_ids(context, example.user_input, len(response_ids), example_id)
            for side, context in self._sides(example)
        )
        return EncodedPair(
            example_id, teacher_ids, student_ids, response_ids, teacher_cut, student_cut
        )

    def collate(self, encoded: Sequence[EncodedPair]) -> PairedBatch:
        """Pad on the right, mask, and prove alignment.

        Raises DataError for an empty list, AlignmentError as `check_alignment`.
        """
        if not encoded:
            raise DataError("collate got no examples", "pass one example at least")
        # The masks tell padding apart, so eos can serve as padding where there is
        # no pad token, and the end of a response stays in the loss even then.
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        responses = [pair.response_ids for pair in encoded]
        return PairedBatch.from_views(
            teacher=_view([p.teacher_prompt_ids for p in encoded], responses, pad),
            student=_view([p.student_prompt_ids for p in encoded], responses, pad),
            example_ids=torch.tensor([p.example_id for p in encoded]),
            truncated=torch.tensor(
                [(p.truncated_teacher, p.truncated_student) for p in encoded]
            ),
        )

    def __call__(self, examples: Sequence[PairedExample]) -> PairedBatch:
        return self.collate([self.encode(e, i) for i, e in enumerate(examples)])

    def boundary_differences(self, example: PairedExample) -> list[str]:
        """The sides on which tokenising prompt + response as one text gives other ids.

        That is no error here, because ids are joined. It shows what code risks that
        finds the response in a text tokenised whole, by the prompt's length.
        """
        response_ids = token_ids(self.tokenizer, example.response)
        differing = []
        for side, context in self._sides(example):
            prompt = side.render(context, example.user_input)
            joined = token_ids(side.tokenizer, prompt) + response_ids
            if token_ids(side.tokenizer, prompt + example.response) != joined:
                differing.append(side.name)
        return differing

    def _sides(self, example: PairedExample) -> list[tuple[PromptSide, str]]:
        return [
            (self.teacher_side, example.context),
            (self.student_side, example.simplified_context),
        ]


def _view(prompts: list[list[int]], responses: list[list[int]], pad: int) -> View:
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    shape = len(rows), max(map(len, rows))
    input_ids = torch.full(shape, pad)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = True
        completion_mask[row, len(prompts[row]) : len(ids)] = True
    return View(input_ids, attention_mask, completion_mask)
