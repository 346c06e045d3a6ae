"""A context as vectors: equal to the text where it can be, trained where fewer."""

from __future__ import annotations

import copy

import pytest
import torch

from kdlib import localize, models
from kdlib.errors import ArgumentError, ModelError, StorageError
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.objective import Objective
from kdlib.pairs import PairCollator, PairedExample
from kdlib.sampling import complete
from kdlib.soft_prompt import SoftPrompt, load_soft_prompt, save_soft_prompt
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, train

CONTEXT = localize.instruction("fr", "long")


@pytest.fixture(scope="module")
def loaded():
    return models.load()


@pytest.fixture(scope="module")
def collator(loaded):
    return PairCollator(loaded[1])


@pytest.fixture(scope="module")
def pairs(collator):
    data = localize.load_split("validation")[::40]
    return [
        collator.encode(
            PairedExample(d.english, d.rendering("fr", "long"), CONTEXT), number
        )
        for number, d in enumerate(data)
    ]


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded[0])


def outputs(student, view):
    mask = view.attention_mask.long()
    with torch.no_grad():
        return student(input_ids=view.input_ids, attention_mask=mask).logits


def test_with_a_vector_a_token_it_is_the_teacher(model, collator, pairs):
    """The optimum, which exists here, is where it starts."""
    student = SoftPrompt.from_context(model, collator, CONTEXT)
    batch = collator.collate(pairs)
    ours = batch.student.select(outputs(student, batch.student))
    theirs = batch.teacher.select(outputs(model, batch.teacher))
    assert torch.allclose(ours, theirs, atol=1e-4)
    without = batch.student.select(outputs(model, batch.student))
    assert not torch.allclose(without, theirs, atol=1)


@pytest.fixture
def templated(loaded):
    """A tokenizer whose prompts begin alike with and without a context."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = (
        "A chat.\n{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("name", ["shipped", "chat template"])
def test_the_place_is_that_of_the_context(name, model, loaded, templated):
    """Also inside a template, after tokens that both sides have."""
    collator = PairCollator(templated if name == "chat template" else loaded[1])
    student = SoftPrompt.from_context(model, collator, CONTEXT)
    pair = collator.encode(PairedExample("1 May", "1er mai", CONTEXT))
    n = len(pair.teacher_prompt_ids) - len(pair.student_prompt_ids)
    assert len(student.vectors) == n > 3
    a = student.at
    short, full = pair.student_prompt_ids, pair.teacher_prompt_ids
    assert short[:a] + full[a : a + n] + short[a:] == full
    table = model.get_input_embeddings().weight
    assert torch.equal(student.vectors, table[full[a : a + n]])


def test_every_position_keeps_its_output(model, templated):
    """Before the vectors as without them; from the last one on, as after the text."""
    collator = PairCollator(templated)
    student = SoftPrompt.from_context(model, collator, CONTEXT)
    batch = collator([PairedExample("1 May", "1er mai", CONTEXT)])
    short, full = batch.student.input_ids[0], batch.teacher.input_ids[0]
    ours = outputs(student, batch.student)[0]
    theirs = outputs(model, batch.teacher)[0]
    n, last = len(full) - len(short), student.at - 1  # the last token before them
    assert len(ours) == len(short) and last > 0
    assert torch.allclose(ours[:last], theirs[:last], atol=1e-4)
    assert torch.allclose(ours[last:], theirs[last + n :], atol=1e-4)


def test_hidden_states_and_decoder_agree_with_the_logits(model, collator, pairs):
    student = SoftPrompt.from_context(model, collator, CONTEXT, 3)
    view = collator.collate(pairs[:4]).student
    inputs = dict(input_ids=view.input_ids, attention_mask=view.attention_mask.long())
    with torch.no_grad():
        whole = student(**inputs, output_hidden_states=True)
        hidden = student.forward_decoder(**inputs).last_hidden_state
    head = model.get_output_embeddings()
    assert torch.allclose(head(hidden), whole.logits, atol=1e-5)
    assert torch.allclose(whole.hidden_states[-1], hidden, atol=1e-6)


def test_completions_are_those_of_the_context(model, loaded, collator, pairs):
    """Prompts of unlike length: generation pads them on the left."""
    student = SoftPrompt.from_context(model, collator, CONTEXT)
    prompts = [p.student_prompt_ids for p in pairs]
    theirs = complete(model, loaded[1], [p.teacher_prompt_ids for p in pairs])
    assert len({len(p) for p in prompts}) > 3
    assert complete(student, loaded[1], prompts) == theirs
    assert complete(model, loaded[1], prompts) != theirs


def kl(student, model, collator, pairs):
    batches = [collator.collate(pairs)]
    return evaluate(student, batches, teacher_reference(LiveTeacher(model), batches)).kl


@pytest.mark.parametrize(
    "hard_weight, fused", [(0.0, False), (0.0, True), (1.0, False)]
)
def test_fewer_vectors_are_trained(model, collator, pairs, hard_weight, fused):
    """By KL and by log-likelihood; only the vectors move."""
    student = SoftPrompt.from_context(model, collator, CONTEXT, 2)
    before = kl(student, model, collator, pairs)
    weights = copy.deepcopy(model.state_dict())
    config = TrainConfig(steps=30, batch_size=16, learning_rate=0.05, fused=fused)
    history = train(
        student,
        pairs,
        collator,
        Objective(hard_weight=hard_weight),
        config,
        teacher=LiveTeacher(model),
    )
    assert history.loss[-1] < history.loss[0] / 2
    assert kl(student, model, collator, pairs) < before / 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_fused_and_plain_have_the_same_loss(model, collator, pairs):
    def losses(fused):
        student = SoftPrompt.from_context(model, collator, CONTEXT, 2)
        config = TrainConfig(steps=3, batch_size=16, learning_rate=0.05, fused=fused)
        teacher = LiveTeacher(model)
        return train(
            student, pairs, collator, Objective(), config, teacher=teacher
        ).loss

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


def test_dropout_of_the_frozen_model_stays_off(model, collator):
    student = SoftPrompt.from_context(model, collator, CONTEXT).train()
    assert student.training and not any(m.training for m in model.modules())


# --- Files ---


def test_saved_and_loaded_it_is_the_same(tmp_path, model, collator, pairs):
    student = SoftPrompt.from_context(model, collator, CONTEXT, 4)
    path = save_soft_prompt(student, tmp_path / "prompt.safetensors")
    again = load_soft_prompt(model, path)
    view = collator.collate(pairs[:3]).student
    assert torch.equal(outputs(again, view), outputs(student, view))
    assert [x.name for x in tmp_path.iterdir()] == ["prompt.safetensors"]
    # The same model in another dtype is the same model.
    load_soft_prompt(copy.deepcopy(model).bfloat16(), path)


def test_another_model_is_refused(tmp_path, model, loaded, collator):
    path = save_soft_prompt(
        SoftPrompt.from_context(model, collator, CONTEXT), tmp_path / "p.safetensors"
    )
    width = model.get_input_embeddings().weight.shape[1]
    for other in (
        models.build(loaded[1], hidden_size=64, layers=1, heads=4),
        models.build(loaded[1], hidden_size=width, layers=1, heads=4),
    ):
        with pytest.raises(ModelError, match="this is"):
            load_soft_prompt(other, path)


@pytest.mark.parametrize("fault", ["missing", "damaged", "another file"])
def test_a_bad_file_is_named(tmp_path, model, fault):
    path = tmp_path / "p.safetensors"
    if fault == "damaged":
        path.write_bytes(b"\x00" * 40)
    if fault == "another file":
        path.write_bytes((models.TEACHER / "model.safetensors").read_bytes())
    with pytest.raises((StorageError, ModelError), match="p.safetensors"):
        load_soft_prompt(model, path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, model, collator):
    (tmp_path / "file").write_text("in the way")
    student = SoftPrompt.from_context(model, collator, CONTEXT)
    with pytest.raises(StorageError):
        save_soft_prompt(student, tmp_path / "file" / "p.safetensors")


# --- Bad input ---


@pytest.mark.parametrize("n", [0, -1, 999])
def test_a_number_of_vectors_that_cannot_be(model, collator, n):
    with pytest.raises(ArgumentError, match=f"n={n}"):
        SoftPrompt.from_context(model, collator, CONTEXT, n)


def test_no_context_has_no_vectors(model, collator):
    with pytest.raises(ArgumentError, match="a context of 0 tokens"):
        SoftPrompt.from_context(model, collator, "")


@pytest.mark.parametrize("shape", [(3,), (0, 160), (2, 7)])
def test_vectors_of_another_shape(model, shape):
    with pytest.raises(ArgumentError, match="vectors of shape"):
        SoftPrompt(model, torch.zeros(shape), 1)
