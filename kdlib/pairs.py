"""From a pair of inputs to one batch with two views of the same response.

The teacher reads the full input (context c, user input z), the student reads a
simplified one x' = (c', z), and both are asked for the next-token distribution at
every token of the same response y:

    teacher's view:  [ c  z  |  y_1 y_2 ... y_n end ]
    student's view:  [ c' z  |  y_1 y_2 ... y_n end ]

The prompts differ in length, so y starts at another column on each side; views.py
knows where. This file knows texts, tokenizers and budgets of length, and nothing of
losses and models. The case c' = c is ordinary
distillation; then both views are equal bit for bit.

Notation: Xiao & Zhu, Foundations of Large Language Models, ch. 3 (arXiv 2501.09223).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from kdlib.errors import ArgumentError, DataError, ModelError
from kdlib.prompts import PromptSide, check_same_tokenizer, token_ids
from kdlib.views import PairedBatch, View

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
