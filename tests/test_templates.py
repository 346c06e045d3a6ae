"""Chat templates at the boundary of prompt and response, on both sides.

The zoo holds the shapes that published templates have, with what each makes of two
prompts written out by hand: the teacher's (context and input) and the student's (input
alone). Where the prompt ends is where the response begins; everything that went wrong
in rows 26 to 30 of the bug museum went wrong there.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from kdlib.errors import DataError
from kdlib.pairs import PairCollator, PairedExample

SPECIALS = ["<pad>", "<s>", "<end>", "<turn>", "<think>", "</think>", "[INST]"]
CONTEXT, INPUT, RESPONSE = "Be brief.", "What is rain?", "Water that falls."
DATE = "05 Jan 2026"


class Shape(NamedTuple):
    """A template, and what it makes of the teacher's and the student's prompt."""

    template: str
    teacher: str
    student: str


def chatml(generation: str, default: str = "") -> str:
    """Turns in special tokens; the token that ends a turn is the eos token."""
    first = f"<turn>system\n{default}<end>\n" if default else ""
    return (
        "{% if messages[0].role != 'system' %}" + first + "{% endif %}"
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n"
        + generation
        + "{% endif %}"
    )


SYSTEM = f"<turn>system\n{CONTEXT}<end>\n"
USER = f"<turn>user\n{INPUT}<end>\n"
ANSWER = "<turn>assistant\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
ZOO = {
    # A system message only where there is one.
    "plain": Shape(chatml(""), SYSTEM + USER + ANSWER, USER + ANSWER),
    # SmolLM2 and Qwen2.5: who brings no system message gets one.
    "default system": Shape(
        chatml("", default="You are helpful."),
        SYSTEM + USER + ANSWER,
        "<turn>system\nYou are helpful.<end>\n" + USER + ANSWER,
    ),
    # DeepSeek-R1 and Qwen3-Thinking: the answer begins inside the thought.
    "opens thinking": Shape(
        chatml("<think>\n"),
        SYSTEM + USER + ANSWER + "<think>\n",
        USER + ANSWER + "<think>\n",
    ),
    # Qwen3: it may think, unless told otherwise; then its thought is written, empty.
    "may think": Shape(
        chatml(
            "{% if enable_thinking is defined and enable_thinking is false %}"
            "<think>\n\n</think>\n\n{% endif %}"
        ),
        SYSTEM + USER + ANSWER,
        USER + ANSWER,
    ),
    # Llama 3.1: bos in the template, contents trimmed, the date in the system message.
    "writes the date": Shape(
        "{{ bos_token }}{% if not date_string is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "<turn>system\nToday: {{ date_string }}\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}<end>"
        "{% for m in messages %}<turn>{{ m.role }}\n\n{{ m.content | trim }}<end>"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n\n{% endif %}",
        f"<s><turn>system\nToday: {DATE}\n\n{CONTEXT}<end>"
        f"<turn>user\n\n{INPUT}<end><turn>assistant\n\n",
        f"<s><turn>system\nToday: {DATE}\n\n<end>"
        f"<turn>user\n\n{INPUT}<end><turn>assistant\n\n",
    ),
    # Gemma: no system role, contents trimmed, the context on top of the input.
    "folds the system": Shape(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{% set top = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
        "{% else %}{% set top = '' %}{% endif %}{% for m in messages %}"
        "<turn>user\n{% if loop.first %}{{ top }}{% endif %}"
        "{{ m.content | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}",
        f"<s><turn>user\n{CONTEXT}\n\n{INPUT}<end>\n<turn>model\n",
        f"<s><turn>user\n{INPUT}<end>\n<turn>model\n",
    ),
    # The first Mistral models: spaces for boundaries, no system role at all.
    "refuses the system": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}[INST] {{ m.content }} [/INST]{% endfor %}",
        f"<s>[INST] {CONTEXT}\n{INPUT} [/INST]",
        f"<s>[INST] {INPUT} [/INST]",
    ),
    # Alpaca, Vicuna: words alone mark the boundary, and can merge with the response.
    "prose": Shape(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        f"system: {CONTEXT}\n\nuser: {INPUT}\n\nassistant: ",
        f"user: {INPUT}\n\nassistant: ",
    ),
}


def build(template, **special_tokens):
    """A byte-level BPE with merges across words, spaces and newlines."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        f"user: {INPUT}\n\n{RESPONSE}\n\n\n assistant: {CONTEXT}\n Water [/INST] Water"
    )
    bpe.train_from_iterator([text] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<end>"}
        | special_tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = build(None)
END = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(autouse=True)
def today(monkeypatch):
    """The date that templates see; the test may turn the page."""

    class Clock(datetime.datetime):
        day = datetime.datetime(2026, 1, 5)

        @classmethod
        def now(cls, tz=None):
            return cls.day

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


every_shape = pytest.mark.parametrize("name", ZOO)


@every_shape
def test_prompts_are_those_written_out_by_hand(name):
    shape = ZOO[name]
    pair = PairCollator(build(shape.template)).encode(
        PairedExample(INPUT, RESPONSE, CONTEXT)
    )
    assert pair.teacher_prompt_ids == ids(shape.teacher)
    assert pair.student_prompt_ids == ids(shape.student)
    assert pair.response_ids == [*ids(RESPONSE), END]


@every_shape
def test_the_mask_covers_the_response_and_its_own_end_alone(name):
    """Museum 30: ends of turns in the prompt, and padding that looks like an end."""
    for special in ({}, {"pad_token": "<end>"}):
        collator = PairCollator(build(ZOO[name].template, **special))
        batch = collator(
            [
                PairedExample(INPUT, RESPONSE, CONTEXT),
                PairedExample(INPUT * 3, "Yes", CONTEXT * 5, CONTEXT),
            ]
        )
        for view in (batch.teacher, batch.student):
            for row, response in enumerate((RESPONSE, "Yes")):
                real = view.input_ids[row, view.attention_mask[row]].tolist()
                n = len(ids(response)) + 1
                assert real[-n:] == [*ids(response), END]
                wanted = torch.zeros_like(view.completion_mask[row])
                wanted[len(real) - n : len(real)] = True
                assert torch.equal(view.completion_mask[row], wanted)


@every_shape
@given(
    user_input=st.text(" \n.aeinrst", max_size=8),
    response=st.text(" \n.aeinrstWY", min_size=1, max_size=8),
    context=st.text(" \n.aeinrst", max_size=8),
)
def test_whitespace_at_the_join_moves_no_token(name, user_input, response, context):
    """Museum 28: whatever stands at the boundary, the response has its own tokens."""
    collator = PairCollator(build_once(name))
    pair = collator.encode(PairedExample(user_input, response, context))
    assert pair.response_ids == [*ids(response), END]
    assert TOKENIZER.decode(pair.response_ids[:-1]) == response
    # The prompt does not depend on what is answered to it.
    other = collator.encode(PairedExample(user_input, "Yes", context))
    assert other.teacher_prompt_ids == pair.teacher_prompt_ids
    assert other.student_prompt_ids == pair.student_prompt_ids
    same = collator.encode(PairedExample(user_input, response, context, context))
    assert same.student_prompt_ids == same.teacher_prompt_ids


BUILT = {}


def build_once(name):
    return BUILT.setdefault(name, build(ZOO[name].template))


def test_where_the_join_would_merge_it_is_reported():
    example = PairedExample(INPUT, RESPONSE, CONTEXT)
    for name, differing in (
        ("plain", []),  # the newline and the word would not merge
        ("prose", ["teacher", "student"]),  # the last space and "Water" would
        ("refuses the system", []),
    ):
        assert PairCollator(build_once(name)).boundary_differences(example) == differing
    spaced = PairedExample(INPUT, "\n\n" + RESPONSE, CONTEXT)
    collator = PairCollator(build_once("writes the date"))
    assert collator.boundary_differences(spaced) == ["teacher", "student"]
    pair = collator.encode(spaced)
    whole = ids(ZOO["writes the date"].teacher + "\n\n" + RESPONSE)
    assert len(whole) < len(pair.teacher_prompt_ids) + len(pair.response_ids) - 1


# --- Default system messages ----------------------------------------------------------


def test_a_shortened_context_keeps_the_default_out_until_nothing_is_left():
    """Of a template that adds one: cutting the last word would make a prompt longer."""
    tokenizer = build_once("default system")
    bare = PairCollator(tokenizer).encode(PairedExample(INPUT, RESPONSE))
    limit = len(bare.teacher_prompt_ids) + len(bare.response_ids)
    long = PairedExample(INPUT, RESPONSE, "rain " * 60)
    for end in ("left", "right"):
        collator = PairCollator(
            tokenizer, teacher_max_length=limit, truncate_context=end
        )
        kept = collator.encode(long)
        assert len(kept.teacher_prompt_ids) + len(kept.response_ids) <= limit
        shown = TOKENIZER.decode(kept.teacher_prompt_ids)
        assert shown.startswith("<turn>system\n") and shown.endswith(USER + ANSWER)
        assert "rain" in shown and "helpful" not in shown
    # No word of context fits: neither does what would stand in its place.
    room = len(ids("<turn>system\n<end>\n" + USER + ANSWER)) + len(bare.response_ids)
    with pytest.raises(DataError, match="no room"):
        PairCollator(tokenizer, teacher_max_length=room).encode(long)


# --- Thinking -----------------------------------------------------------------------


def test_a_thought_in_the_response_stays_whole():
    """Templates drop thoughts from earlier turns; a response is none of those."""
    thought = "<think>\nWater?\n</think>\n\nWater."
    for name in ("plain", "may think"):
        pair = PairCollator(build_once(name)).encode(PairedExample(INPUT, thought))
        assert pair.response_ids == [*ids(thought), END]
        assert pair.response_ids[0] == TOKENIZER.convert_tokens_to_ids("<think>")


def test_thinking_is_switched_off_in_the_template_itself():
    off = "{% set enable_thinking = false %}" + ZOO["may think"].template
    pair = PairCollator(build(off)).encode(PairedExample(INPUT, RESPONSE, CONTEXT))
    assert pair.teacher_prompt_ids == ids(SYSTEM + USER + ANSWER + NO_THOUGHT)
    assert pair.student_prompt_ids == ids(USER + ANSWER + NO_THOUGHT)


def test_each_side_thinks_as_its_own_template_says():
    """Museum 26 and 27: a teacher inside its thought, a student behind it.

    The views are what was asked for; that the first tokens then dominate the loss is
    for the templates to avoid, as in the test above.
    """
    off = "{% set enable_thinking = false %}" + ZOO["may think"].template
    collator = PairCollator(build(off), teacher_tokenizer=build_once("opens thinking"))
    batch = collator([PairedExample(INPUT, RESPONSE)])
    for view, prompt in (
        (batch.teacher, USER + ANSWER + "<think>\n"),
        (batch.student, USER + ANSWER + NO_THOUGHT),
    ):
        first = int(view.completion_mask[0].nonzero()[0])
        assert view.input_ids[0, :first].tolist() == ids(prompt)


# --- The date -----------------------------------------------------------------------


def test_both_sides_read_the_same_date(today):
    collator = PairCollator(build_once("writes the date"))
    pair = collator.encode(PairedExample(INPUT, RESPONSE, CONTEXT))
    for prompt in (pair.teacher_prompt_ids, pair.student_prompt_ids):
        assert f"Today: {DATE}" in TOKENIZER.decode(prompt)


def test_a_date_that_is_set_in_the_template_stays(today):
    """Else tomorrow's prompts are others: no cache fits them, and no run goes on."""
    example = PairedExample(INPUT, RESPONSE, CONTEXT)
    template = ZOO["writes the date"].template
    pinned = "{% set date_string = '26 Jul 2024' %}" + template
    found = {}
    for day in (5, 6):
        today.day = datetime.datetime(2026, 1, day)
        for name, text in (("moving", template), ("pinned", pinned)):
            pair = PairCollator(build(text)).encode(example)
            found[name, day] = TOKENIZER.decode(pair.teacher_prompt_ids)
    assert found["moving", 5] != found["moving", 6]
    assert found["pinned", 5] == found["pinned", 6]
    assert "Today: 26 Jul 2024" in found["pinned", 6]
