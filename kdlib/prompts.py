"""How a prompt becomes token ids, and when two tokenizers mean the same by an id.

    prompt = the template's text, or bos, context, newline, user input, newline
    ids    = the whole text, tokenised once; a context that is too long is cut before

Knows tokenizers, chat templates and budgets. Knows nothing of the other side, nor of
the response but its length.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from kdlib.errors import ArgumentError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n"  # between context, user input and response where no template rules


class PromptSide:
    """How one side's prompts are written: its tokenizer, template and budget."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        truncate_context: str,
    ):
        if not isinstance(max_length, int) or max_length < 1:
            raise ArgumentError(
                f"{name}_max_length={max_length!r}", "pass a number of tokens"
            )
        self.name, self.tokenizer, self.max_length = name, tokenizer, max_length
        self.truncate_context = truncate_context
        self.bos = []
        if not tokenizer.chat_template:
            if tokenizer.bos_token_id is not None:
                self.bos = [tokenizer.bos_token_id]
            return
        # Some templates refuse a system message, others drop it without a word.
        self.system_role = True
        if self._template_fault():
            self.system_role = False
        if fault := self._template_fault():
            raise ModelError(
                f"the {name}'s chat template cannot show a context and a user's "
                f"message: {fault}",
                "set tokenizer.chat_template to one that takes messages as text",
            )

    def _template_fault(self) -> str:
        try:
            shown = self.render("A context", "An input")
        except Exception as error:  # a template can raise anything
            return f"{type(error).__name__}: {error}"
        if shown.count("A context") == shown.count("An input") == 1:
            return ""
        return f"it makes {shown!r} of them"

    def render(self, context: str, user_input: str) -> str:
        """The prompt as text."""
        if not self.tokenizer.chat_template:
            return (context and context + SEPARATOR) + user_input + SEPARATOR
        messages = []
        if context and self.system_role:
            messages = [{"role": "system", "content": context}]
        elif context:
            user_input = context + SEPARATOR + user_input
        return self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": user_input}],
            tokenize=False,
            add_generation_prompt=True,
        )

    def prompt_ids(
        self, context: str, user_input: str, response_length: int, example_id: int
    ) -> tuple[list[int], int]:
        """Ids that leave room for the response, and how many tokens that cost."""
        where = f"example {example_id}, {self.name}'s side"
        whole = ids = self._ids(context, user_input)
        kept, dropped = context, 0
        while (excess := len(ids) + response_length - self.max_length) > 0:
            if not kept or self.truncate_context == "never":
                long = response_length >= self.max_length
                fault = "response longer than the budget" if long else "no room"
                how = "(truncate_context='never')" if kept else "(no context)"
                raise DataError(
                    f"{where}: {fault}: {len(ids)} prompt tokens {how} + "
                    f"{response_length} of the response exceed "
                    f"{self.name}_max_length={self.max_length}",
                    f"raise {self.name}_max_length, or shorten the text",
                )
            # What is left can merge into other tokens: count again, then go on by one.
            dropped = max(excess, dropped + 1)
            kept = self._shorten(context, dropped)
            ids = self._ids(kept, user_input)
        if not ids:
            raise DataError(
                f"{where}: the prompt has no tokens, so that no position predicts "
                "the first response token",
                "give it some text, or set a bos token or a chat template",
            )
        return ids, len(whole) - len(ids)

    def _ids(self, context: str, user_input: str) -> list[int]:
        return self.bos + token_ids(self.tokenizer, self.render(context, user_input))

    def _shorten(self, context: str, n: int) -> str:
        """The context's text without n of its tokens, cut between characters."""
        if not self.tokenizer.is_fast:
            raise DataError(
                f"the {self.name}'s context must be shortened, but its tokenizer "
                "gives no character offsets",
                f"use a fast tokenizer, or raise {self.name}_max_length",
            )
        offsets = self.tokenizer(
            context,
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )["offset_mapping"]
        if n >= len(offsets):
            return ""
        # Cuts lie where a token ends. That keeps a word's space, which its offsets may
        # leave out, with the word; and a character whose bytes are several tokens has
        # its own end as the end of each.
        if self.truncate_context == "left":
            return context[offsets[n - 1][1] :]
        return context[: offsets[-n - 1][1]]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_same_tokenizer(
    teacher_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare by content; two vocabularies of equal size may number other tokens.

    Raises ModelError naming what differs.
    """
    theirs, ours = tokenizer_content(teacher_tokenizer), tokenizer_content(tokenizer)
    names = sorted(theirs.keys() | ours.keys())
    differing = [name for name in names if theirs.get(name) != ours.get(name)]
    if differing:
        raise ModelError(
            f"teacher's and student's tokenizers differ in {', '.join(differing)} "
            f"({len(teacher_tokenizer)} and {len(tokenizer)} tokens)",
            "token-level distillation needs one vocabulary; between vocabularies, "
            "train on the teacher's responses as text (sequence-level targets)",
        )
    if teacher_tokenizer.eos_token_id != tokenizer.eos_token_id:
        raise ModelError(
            f"teacher's responses end with {teacher_tokenizer.eos_token!r}, "
            f"student's with {tokenizer.eos_token!r}",
            "set eos_token of both tokenizers to the token that ends a turn",
        )


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What decides which ids a text gets, part by part, as canonical JSON."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("vocab", "merges"):
            parts[name] = parts["model"].pop(name, None)
        # The rest is decoding, or settings of the last call (padding, truncation).
        names = ("normalizer", "pre_tokenizer", "model", "vocab", "merges")
        parts = {name: parts[name] for name in (*names, "added_tokens")}
    else:
        parts = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return {name: json.dumps(part, sort_keys=True) for name, part in parts.items()}
