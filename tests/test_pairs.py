"""pairs.py against ids written out by hand, and against transformers' own loss."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from kdlib.errors import AlignmentError, ArgumentError, DataError, ModelError
from kdlib.pairs import PairCollator, PairedExample
from kdlib.views import PairedBatch, View, check_alignment

SPECIALS = ["<|pad|>", "<|end|>", "<|context|>", "<|input|>", "<|answer|>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role']=='system' %}<|context|>{{ m['content'] }}"
    "{% elif m['role']=='user' %}<|input|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}" + TEMPLATE
)
DROPS_SYSTEM = "<|input|>{{ messages[-1]['content'] }}<|answer|>"
FOLDS_SYSTEM = (  # as Gemma does, stripping included
    "{% set c = messages[0]['content'] + '\n\n' if messages|length > 1 else '' %}"
    "<|input|>{{ c }}{{ messages[-1]['content'] | trim }}<|answer|>"
)
STRIPS = TEMPLATE.replace("m['content'] }}", "m['content'] | trim }}")
PROSE = (  # no special token keeps its parts apart
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "assistant: "
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|context|>Hi\n{% endif %}"
    "<|input|>{{ m['role'] + '\n' + m['content'] }}\n{% endfor %}<|answer|>"
)


def build_tokenizer(chat_template=TEMPLATE, vocab_size=330, **special_tokens):
    """A byte-level BPE that knows a few merges, also across words and bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["hello world, the price is 15 euros\n\n  le prix est été 日本語😀😀"]
    bpe.train_from_iterator(texts * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **{"pad_token": "<|pad|>", "eos_token": "<|end|>"} | special_tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


TOKENIZER = build_tokenizer()
PAD, END, CONTEXT, INPUT, ANSWER = range(5)


def ids(text: str) -> list[int]:
    return TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids


# Every character but halves of surrogate pairs, with plenty of those that meet
# merges: spaces, newlines, emojis, letters of the corpus.
text = st.text(
    st.one_of(st.sampled_from(" \n aeloh😀é日"), st.characters(codec="utf-8")),
    max_size=12,
)
texts = st.one_of(text, st.just(""), text.map(lambda t: f" {t} "))
ends = st.sampled_from(["left", "right"])
examples = st.builds(PairedExample, texts, texts.filter(bool), texts, texts)


def response_of(view: View, row: int) -> list[int]:
    return [
        int(token)
        for token, mine in zip(
            view.input_ids[row], view.completion_mask[row], strict=True
        )
        if mine
    ]


# --- Both views, token by token -----------------------------------------------------


@given(st.lists(examples, min_size=1, max_size=4))
def test_views_hold_exactly_the_ids_written_out_by_hand(batch_examples):
    batch = PairCollator(TOKENIZER)(batch_examples)
    for row, e in enumerate(batch_examples):
        response = [*ids(e.response), END]
        for view, context in (
            (batch.teacher, e.context),
            (batch.student, e.simplified_context),
        ):
            head = [CONTEXT, *ids(context)] if context else []
            prompt = [*head, INPUT, *ids(e.user_input), ANSWER]
            n, m = len(prompt), len(response)
            width = view.input_ids.shape[1]
            assert view.input_ids[row].tolist() == (
                prompt + response + [PAD] * (width - n - m)
            )
            assert view.attention_mask[row].tolist() == (
                [True] * (n + m) + [False] * (width - n - m)
            )
            assert view.completion_mask[row].tolist() == (
                [False] * n + [True] * m + [False] * (width - n - m)
            )


@given(st.lists(examples, min_size=1, max_size=4))
def test_both_sides_hold_the_same_response_and_it_decodes_to_the_text(batch_examples):
    batch = PairCollator(TOKENIZER)(batch_examples)
    flat, rows = [], []
    for row, e in enumerate(batch_examples):
        teacher, student = (response_of(v, row) for v in (batch.teacher, batch.student))
        assert teacher == student
        assert teacher[-1] == END
        assert TOKENIZER.decode(teacher[:-1]) == e.response
        flat += teacher
        rows += [row] * len(teacher)
    assert batch.response_ids.tolist() == flat
    assert batch.row_ids.tolist() == rows
    assert batch.example_ids.tolist() == list(range(len(batch_examples)))
    assert batch.truncated.tolist() == [[0, 0]] * len(batch_examples)


@given(st.lists(examples, min_size=1, max_size=3))
def test_teacher_and_student_see_the_same_response_prefix(batch_examples):
    """What a position has read after its prompt is y_1 .. y_(n-1), on both sides."""
    batch = PairCollator(TOKENIZER)(batch_examples)
    seen = {"teacher": [], "student": []}
    for side, context_of in (("teacher", "context"), ("student", "simplified_context")):
        view = getattr(batch, side)
        positions = torch.arange(view.input_ids.shape[1]).expand_as(view.input_ids)
        for row, at in zip(
            batch.row_ids.tolist(), view.select(positions).tolist(), strict=True
        ):
            e = batch_examples[row]
            context = getattr(e, context_of)
            head = [CONTEXT, *ids(context)] if context else []
            prompt = [*head, INPUT, *ids(e.user_input), ANSWER]
            read = view.input_ids[row, : at + 1].tolist()
            assert read[: len(prompt)] == prompt
            seen[side].append((row, read[len(prompt) :]))
    assert seen["teacher"] == seen["student"]
    expected = [
        (row, [*ids(e.response), END][:n])
        for row, e in enumerate(batch_examples)
        for n in range(len(ids(e.response)) + 1)
    ]
    assert seen["student"] == expected


@given(st.lists(st.tuples(texts, texts.filter(bool), texts), min_size=1, max_size=3))
def test_equal_contexts_give_bit_identical_views(rows):
    """Ordinary distillation is the case c' = c; no context at all is one of it."""
    batch = PairCollator(TOKENIZER)([PairedExample(z, y, c, c) for z, y, c in rows])
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(getattr(batch.teacher, name), getattr(batch.student, name))


# --- The label shift ----------------------------------------------------------------


def test_the_first_response_token_is_predicted_from_the_last_prompt_position():
    """Museum 1: a mask over unshifted logits never distils the first token."""
    collator = PairCollator(TOKENIZER)
    encoded = [
        collator.encode(PairedExample("z", "yes", "a long context", ""), 7),
        collator.encode(PairedExample("hello world", "no", "", "tag"), 9),
    ]
    batch = collator.collate(encoded)
    for view, prompts in (
        (batch.teacher, [p.teacher_prompt_ids for p in encoded]),
        (batch.student, [p.student_prompt_ids for p in encoded]),
    ):
        rows, width = view.input_ids.shape
        # Logits whose value is 100 * row + position.
        logits = 100 * torch.arange(rows)[:, None] + torch.arange(width)
        expected = [
            100 * row + len(prompt) - 1 + n
            for row, prompt in enumerate(prompts)
            for n in range(len(encoded[row].response_ids))
        ]
        assert view.select(logits).tolist() == expected
        assert view.select(logits[..., None].expand(-1, -1, 5)).shape == (
            len(expected),
            5,
        )
    assert batch.example_ids.tolist() == [7, 9]


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).double().eval()


ROWS = [
    PairedExample("hello", "le prix", "speak French, please", "fr"),
    PairedExample("15", "été 😀", "a much longer context, with examples: 1, 2, 3", ""),
    PairedExample("", "\n", "", "tag"),
]


def test_selected_logits_give_the_loss_that_transformers_computes(llama):
    batch = PairCollator(TOKENIZER)(ROWS)
    for view in (batch.teacher, batch.student):
        labels = view.input_ids.masked_fill(~view.completion_mask, -100)
        with torch.no_grad():
            out = llama(view.input_ids, attention_mask=view.attention_mask)
            theirs = llama.loss_function(out.logits, labels, len(TOKENIZER))
        ours = torch.nn.functional.cross_entropy(
            view.select(out.logits), batch.response_ids
        )
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)


def test_a_longer_row_changes_nothing_but_padding(llama):
    collator = PairCollator(TOKENIZER)
    alone = collator([ROWS[0]])
    longer = PairedExample("hello " * 30, "world " * 30, "context " * 30, "tag " * 30)
    together = collator([ROWS[0], longer])
    for side in ("teacher", "student"):
        a, b = getattr(alone, side), getattr(together, side)
        n = a.input_ids.shape[1]
        assert torch.equal(a.input_ids[0], b.input_ids[0, :n])
        assert torch.equal(a.completion_mask[0], b.completion_mask[0, :n])
        assert not b.attention_mask[0, n:].any()
        assert not b.completion_mask[0, n:].any()
        assert (b.input_ids[0, n:] == PAD).all()
        with torch.no_grad():
            x, y = (
                v.select(llama(v.input_ids, attention_mask=v.attention_mask).logits)
                for v in (a, b)
            )
        torch.testing.assert_close(x, y[together.row_ids == 0])
    assert torch.equal(alone.response_ids, together.response_ids[together.row_ids == 0])


@pytest.mark.parametrize("pad_token", [None, "<|end|>"])
def test_the_end_token_stays_in_the_response_where_it_also_pads(pad_token):
    """Museum 30."""
    collator = PairCollator(build_tokenizer(pad_token=pad_token))
    batch = collator([PairedExample("a", "b"), PairedExample("a" * 9, "b" * 9)])
    for view in (batch.teacher, batch.student):
        assert view.input_ids[0, -1] == END
        assert not view.attention_mask[0, -1]
        assert response_of(view, 0) == [*ids("b"), END]
        assert response_of(view, 1) == [*ids("b" * 9), END]


# --- One budget a side --------------------------------------------------------------


BYTES = build_tokenizer(vocab_size=5 + 256)  # no merges: a token is a byte


@given(examples, st.integers(1, 60), st.integers(1, 60), ends)
@settings(max_examples=150)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, BYTES], ids=["merges", "bytes"])
def test_only_the_context_is_shortened(tokenizer, e, t_max, s_max, end):
    def prompt(context, user_input=e.user_input):
        text = f"<|context|>{context}" if context else ""
        return tokenizer(f"{text}<|input|>{user_input}<|answer|>")["input_ids"]

    response = [*tokenizer(e.response)["input_ids"], END]
    collator = PairCollator(
        tokenizer,
        teacher_max_length=t_max,
        student_max_length=s_max,
        truncate_context=end,
    )
    if len(prompt("")) + len(response) > min(t_max, s_max):
        with pytest.raises(DataError):
            collator.encode(e)
        return
    pair = collator.encode(e)
    assert pair.response_ids == response
    for ids_, cut, context, limit in (
        (pair.teacher_prompt_ids, pair.truncated_teacher, e.context, t_max),
        (pair.student_prompt_ids, pair.truncated_student, e.simplified_context, s_max),
    ):
        room = limit - len(response)
        assert len(ids_) <= room
        assert len(ids_) == len(prompt(context)) - cut
        assert (cut > 0) == (len(prompt(context)) > room)
        # The prompt is that of a part of the context: the longest one that fits.
        n = len(context)
        parts = [
            context[k:] if end == "left" else context[: n - k] for k in range(n + 1)
        ]
        assert ids_ in [prompt(part) for part in parts]
        if tokenizer is BYTES:
            assert ids_ == next(p for p in map(prompt, parts) if len(p) <= room)
    assert collator.collate([pair]).truncated.tolist() == [
        [pair.truncated_teacher, pair.truncated_student]
    ]


def test_the_budgets_are_independent():
    """Museum 31: the teacher's prompt cut to the student's limit."""
    e = PairedExample("hello", "world", "ab " * 50, "ba " * 50)
    whole = PairCollator(TOKENIZER).encode(e)
    n = len(whole.response_ids)
    small_student = PairCollator(TOKENIZER, student_max_length=30).encode(e)
    assert small_student.teacher_prompt_ids == whole.teacher_prompt_ids
    assert len(small_student.student_prompt_ids) + n == 30
    assert (small_student.truncated_teacher, whole.truncated_student) == (0, 0)
    small_teacher = PairCollator(TOKENIZER, teacher_max_length=30).encode(e)
    assert small_teacher.student_prompt_ids == whole.student_prompt_ids
    assert len(small_teacher.teacher_prompt_ids) + n == 30


def test_an_emoji_is_cut_off_whole():
    e = PairedExample("z", "y", "😀😀é")
    whole = PairCollator(BYTES).encode(e)
    assert len(whole.teacher_prompt_ids) == 1 + 4 + 4 + 2 + 3
    for end, kept, cut in (("left", "😀é", 4), ("right", "😀", 6)):
        collator = PairCollator(
            BYTES, teacher_max_length=1 + 7 + 3 + 2, truncate_context=end
        )
        pair = collator.encode(e)
        assert BYTES.decode(pair.teacher_prompt_ids) == (
            f"<|context|>{kept}<|input|>z<|answer|>"
        )
        assert pair.truncated_teacher == cut


@pytest.mark.parametrize("template", [PROSE, STRIPS, FOLDS_SYSTEM, SMOLLM2, None])
@pytest.mark.parametrize("end", ["left", "right"])
@pytest.mark.parametrize(
    "context", ["the price is 15", " le prix ", "\n\nsystem: user", "a a a a"]
)
def test_a_shortened_context_is_a_shorter_context(template, end, context):
    """In every template, word by word, until none is left. Also where the context's
    text occurs in the template or the user's input, and where no special token keeps
    the context's tokens apart from the template's."""
    tokenizer = build_tokenizer(template)
    # Offsets without the space before a word, as in GPT-2's tokenizer.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)

    def prompt_ids(context, **options):
        collator = PairCollator(tokenizer, truncate_context=end, **options)
        pair = collator.encode(PairedExample(f"{context_}, a: a", "y", context))
        return pair.teacher_prompt_ids

    context_ = context
    n = len(context)
    parts = [context[k:] if end == "left" else context[: n - k] for k in range(n + 1)]
    prompts = [prompt_ids(part) for part in parts]
    kept = []
    for limit in range(len(prompts[0]) + 2, len(prompts[-1]) + 1, -1):
        ids_ = prompt_ids(context, teacher_max_length=limit)
        assert len(ids_) + 2 <= limit
        kept.append(prompts.index(ids_))
        assert (kept[-1] == 0) == (len(prompts[0]) + 2 <= limit)
    with pytest.raises(DataError, match=r"no room: \d+ prompt tokens \(no context\)"):
        prompt_ids(context, teacher_max_length=len(prompts[-1]) + 1)
    if context == "a a a a" and template in (None, PROSE):
        # A word goes with the space before it.
        fewer = {" a a a", " a a"} if end == "left" else {"a a a", "a a"}
        assert {parts[k] for k in kept} >= fewer


# --- Templates ----------------------------------------------------------------------


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_role_gets_the_context_in_the_users_message(template):
    tokenizer = build_tokenizer(template)
    pair = PairCollator(tokenizer).encode(PairedExample("hello", "y", "context", ""))
    assert tokenizer.decode(pair.teacher_prompt_ids) == (
        "<|input|>context\nhello<|answer|>"
    )
    assert tokenizer.decode(pair.student_prompt_ids) == "<|input|>hello<|answer|>"


@pytest.mark.parametrize(
    "template, prompt, bare",
    [
        (
            FOLDS_SYSTEM,
            "<|input|>context\n\nhello<|answer|>",
            "<|input|>hello<|answer|>",
        ),
        (
            SMOLLM2,
            "<|input|>system\ncontext\n<|input|>user\nhello\n<|answer|>",
            "<|context|>Hi\n<|input|>user\nhello\n<|answer|>",
        ),
        (None, "context\nhello\n", "hello\n"),
    ],
)
def test_prompts_are_what_the_template_makes_of_them(template, prompt, bare):
    tokenizer = build_tokenizer(template)
    pair = PairCollator(tokenizer).encode(PairedExample("hello", "y", "context", ""))
    assert pair.teacher_prompt_ids == ids(prompt)
    assert pair.student_prompt_ids == ids(bare)


def test_without_a_template_the_prompt_starts_with_bos_and_keeps_it():
    tokenizer = build_tokenizer(None, bos_token="<|context|>")
    e = PairedExample("hello", "y", "the price")
    pair = PairCollator(tokenizer).encode(e)
    assert pair.teacher_prompt_ids == [CONTEXT, *ids("the price\nhello\n")]
    assert pair.student_prompt_ids == [CONTEXT, *ids("hello\n")]
    limit = len(pair.student_prompt_ids) + len(pair.response_ids)
    short = PairCollator(tokenizer, teacher_max_length=limit).encode(e)
    assert short.teacher_prompt_ids == pair.student_prompt_ids


@pytest.mark.parametrize("template", [None, "{{ bos_token }}" + TEMPLATE])
def test_bos_stands_once_where_the_tokenizer_also_adds_it(template):
    tokenizer = build_tokenizer(template, bos_token="<|context|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|context|> $A <|end|>",
        special_tokens=[("<|context|>", CONTEXT), ("<|end|>", END)],
    )
    assert tokenizer("z")["input_ids"] == [CONTEXT, *ids("z"), END]
    pair = PairCollator(tokenizer).encode(PairedExample("z", "y"))
    shown = "z\n" if template is None else "<|input|>z<|answer|>"
    assert pair.teacher_prompt_ids == [CONTEXT, *ids(shown)]
    assert pair.response_ids == [*ids("y"), END]


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('never') }}", "TemplateError: never"),
        ("<|answer|>", re.escape("'<|answer|>'")),
        ("{{ messages[0]['content']['text']['x'] }}", "UndefinedError"),
        (TEMPLATE + TEMPLATE, "A context.*A context"),  # every message twice
    ],
)
def test_a_template_that_shows_no_messages_is_refused(template, reason):
    with pytest.raises(ModelError, match=reason):
        PairCollator(build_tokenizer(template))


def test_ids_are_joined_where_the_joined_text_would_merge():
    """Museum 28: the boundary of prompt and response in a text tokenised whole."""
    tokenizer = build_tokenizer(PROSE)
    collator = PairCollator(tokenizer)
    e = PairedExample("hello", "world", "context")
    prompt = "system: context\nuser: hello\nassistant: "
    assert ids(prompt + "world") != ids(prompt) + ids("world")
    pair = collator.encode(e)
    assert pair.teacher_prompt_ids == ids(prompt)
    assert pair.response_ids == [*ids("world"), END]
    assert collator.boundary_differences(e) == ["teacher", "student"]


@given(examples)
def test_special_tokens_around_the_response_keep_it_apart(e):
    assert PairCollator(TOKENIZER).boundary_differences(e) == []


def test_a_boundary_can_differ_on_one_side_only():
    teacher = build_tokenizer(PROSE)
    collator = PairCollator(TOKENIZER, teacher_tokenizer=teacher)
    assert collator.boundary_differences(PairedExample("z", "world")) == ["teacher"]


# --- Two tokenizers -----------------------------------------------------------------


def test_an_equal_tokenizer_is_accepted_whatever_its_last_call_left_behind():
    other = copy.deepcopy(TOKENIZER)
    other(["a", "b c"], padding="max_length", max_length=20, truncation=True)
    e = PairedExample("hello " * 9, "y", "c", "c")
    pair = PairCollator(TOKENIZER, teacher_tokenizer=other).encode(e)
    assert pair.teacher_prompt_ids == pair.student_prompt_ids


def test_each_side_is_rendered_with_its_own_template():
    """Museum 26: the teacher scoring the student's template."""
    collator = PairCollator(TOKENIZER, teacher_tokenizer=build_tokenizer(PROSE))
    batch = collator([PairedExample("z", "y")])
    teacher, student = (
        TOKENIZER.decode(v.input_ids[0]) for v in (batch.teacher, batch.student)
    )
    assert teacher == "user: z\nassistant: y<|end|>"
    assert student == "<|input|>z<|answer|>y<|end|>"


def renumbered():
    """As many tokens with the same names, two of them with each other's number."""
    import json

    parts = json.loads(TOKENIZER.backend_tokenizer.to_str())
    vocab = parts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    other = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(
        tokenizer_object=other, pad_token="<|pad|>", eos_token="<|end|>"
    )


def with_an_added_token():
    other = copy.deepcopy(TOKENIZER)
    other.add_tokens(["<|tag|>"])
    return other


@pytest.mark.parametrize(
    "other, what",
    [
        (renumbered, "differ in vocab "),
        (lambda: build_tokenizer(vocab_size=300), "differ in merges, vocab "),
        (with_an_added_token, "added_tokens"),
        (lambda: build_tokenizer(eos_token="<|pad|>"), "'<|pad|>', student's with"),
        (lambda: CharTokenizer(), "class"),
    ],
)
def test_another_tokenizer_is_refused(other, what):
    with pytest.raises(ModelError, match=re.escape(what)) as caught:
        PairCollator(TOKENIZER, teacher_tokenizer=other())
    assert re.search("sequence-level|eos_token", caught.value.remedy)


class CharTokenizer(PreTrainedTokenizer):
    """A tokenizer written in Python: no backend, no offsets."""

    def __init__(self):
        super().__init__(eos_token="<|end|>", pad_token="<|end|>")

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_slow_tokenizer_works_until_a_context_must_be_shortened():
    e = PairedExample("z", "yes", "context")
    collator = PairCollator(CharTokenizer(), teacher_tokenizer=CharTokenizer())
    pair = collator.encode(e)
    assert pair.teacher_prompt_ids == [*map(ord, "context\nz\n")]
    assert pair.response_ids[:-1] == [*map(ord, "yes")]
    with pytest.raises(DataError, match="no character offsets"):
        PairCollator(CharTokenizer(), teacher_max_length=10).encode(e)


# --- Alignment is proven ------------------------------------------------------------


def view(rows: list[list[int]], masks: list[list[int]]) -> View:
    mask = torch.tensor(masks).bool()
    return View(torch.tensor(rows), torch.ones_like(mask), mask)


def test_a_tampered_token_is_found():
    batch = PairCollator(TOKENIZER)(ROWS)
    tampered = batch.teacher.input_ids.clone()
    at = batch.teacher.completion_mask[1].nonzero()[1, 0]
    right, wrong = int(tampered[1, at]), 77
    tampered[1, at] = wrong
    teacher = View(
        tampered, batch.teacher.attention_mask, batch.teacher.completion_mask
    )
    with pytest.raises(
        AlignmentError,
        match=rf"row 1 \(example 8\), response position 1: teacher's token is {wrong}, "
        rf"student's is {right}",
    ):
        PairedBatch.from_views(teacher, batch.student, torch.tensor([5, 8, 6]))


def test_row_errors_that_cancel_in_the_count_are_found():
    """Museum 29: teacher rows of 1 and 2 tokens, student rows of 2 and 1."""
    rows = [[9, 4, 4, 4], [9, 4, 4, 4]]
    teacher = view(rows, [[0, 1, 0, 0], [0, 1, 1, 0]])
    student = view(rows, [[0, 1, 1, 0], [0, 1, 0, 0]])
    assert teacher.completion_mask.sum() == student.completion_mask.sum()
    with pytest.raises(
        AlignmentError,
        match=r"row 0 \(example 3\), response position 1: teacher's token is None, "
        "student's is 4",
    ):
        check_alignment(teacher, student, torch.tensor([3, 4]))


def test_swapped_rows_of_equal_length_are_found():
    teacher = view([[9, 1, 2], [9, 3, 4]], [[0, 1, 1], [0, 1, 1]])
    student = view([[9, 3, 4], [9, 1, 2]], [[0, 1, 1], [0, 1, 1]])
    with pytest.raises(AlignmentError, match="row 0 .* position 0: .* 1, .* 3"):
        check_alignment(teacher, student, torch.tensor([0, 1]))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_masks_that_select_padding_or_the_unpredictable_are_refused(side):
    good = view([[9, 4, 4]], [[0, 1, 1]])
    first = view([[4, 4, 9]], [[1, 1, 0]])
    padded = View(
        good.input_ids, torch.tensor([[True, True, False]]), good.completion_mask
    )
    for bad, what in ((first, "column 0"), (padded, "padding")):
        views = (bad, good) if side == "teacher" else (good, bad)
        with pytest.raises(AlignmentError, match=f"the {side}'s .*{what}"):
            check_alignment(*views, torch.tensor([0]))


def test_views_of_different_height_are_refused():
    one, two = view([[9, 4]], [[0, 1]]), view([[9, 4]] * 2, [[0, 1]] * 2)
    for args in ((one, two, [0]), (two, one, [0, 1]), (one, one, [0, 1])):
        with pytest.raises(AlignmentError, match="rows"):
            check_alignment(*args[:2], torch.tensor(args[2]))


# --- Bad input, and the rest --------------------------------------------------------


def test_a_mask_of_integers_or_of_another_shape_is_refused():
    token_ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3).bool()
    with pytest.raises(ArgumentError, match="completion_mask is torch.int64"):
        View(token_ids, mask, mask.long())
    with pytest.raises(ArgumentError, match=r"attention_mask is torch.bool \(2, 2\)"):
        View(token_ids, mask[:, :2], mask)


def test_select_refuses_what_is_shifted_already():
    v = view([[9, 4, 4]], [[0, 1, 1]])
    with pytest.raises(ArgumentError, match=r"\(1, 2, 7\).*\[1, 3\]"):
        v.select(torch.zeros(1, 2, 7))


@pytest.mark.parametrize(
    "example, options, message",
    [
        (PairedExample("z", ""), {}, "response '' has no tokens"),
        (PairedExample("z", None), {}, "response is not text.*NoneType"),
        (PairedExample(3, "y"), {}, "user_input is not text.*int"),
        (PairedExample("z", "y", ["c"]), {}, "context is not text.*list"),
        (PairedExample("z", "y", "", b"c"), {}, "simplified_context is not text"),
        (PairedExample("z", "\ud83d"), {}, "response is not text.*surrogates"),
        (PairedExample("z", "y<|end|>"), {}, "holds the end token '<|end|>' itself"),
        (
            PairedExample("z", "yyy"),
            {"student_max_length": 4},
            "student's side: response longer than the budget: 3 prompt tokens "
            "(no context) + 4 of the response exceed student_max_length=4",
        ),
        (
            PairedExample("zzz", "yyy", "cc"),
            {"teacher_max_length": 8},
            "teacher's side: no room: 5 prompt tokens (no context) + 4 of the response "
            "exceed teacher_max_length=8",
        ),
        (
            PairedExample("zzz", "yyy", "ccc"),
            {"teacher_max_length": 12, "truncate_context": "never"},
            "no room: 9 prompt tokens (truncate_context='never') + 4 of the response "
            "exceed teacher_max_length=12",
        ),
    ],
)
def test_bad_examples_are_refused_with_their_number(example, options, message):
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(DataError, match="example 41.*" + pattern) as caught:
        PairCollator(TOKENIZER, **options).encode(example, 41)
    assert caught.value.remedy


def test_a_prompt_without_tokens_is_refused():
    """Nothing would predict the first response token, and select would lose it."""
    words = Tokenizer(models.WordLevel({"yes": 0, "end": 1}, unk_token="yes"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end")
    with pytest.raises(DataError, match="example 0, teacher's side: the prompt has no"):
        PairCollator(tokenizer).encode(PairedExample("", "yes"))


def test_bad_options_are_refused():
    with pytest.raises(ArgumentError, match="truncate_context='middle'"):
        PairCollator(TOKENIZER, truncate_context="middle")
    for name in ("teacher_max_length", "student_max_length"):
        for value in (0, None, 10.0):
            with pytest.raises(ArgumentError, match=f"{name}={value}"):
                PairCollator(TOKENIZER, **{name: value})
    with pytest.raises(ModelError, match="no eos token"):
        PairCollator(build_tokenizer(eos_token=None))
    with pytest.raises(DataError, match="no examples"):
        PairCollator(TOKENIZER).collate([])


def test_to_moves_every_tensor():
    moved = PairCollator(TOKENIZER)(ROWS).to("meta")
    tensors = [moved.response_ids, moved.row_ids, moved.example_ids, moved.truncated]
    for v in (moved.teacher, moved.student):
        tensors += [v.input_ids, v.attention_mask, v.completion_mask]
    assert all(tensor.is_meta for tensor in tensors)
