"""The loop's parts: precision, order, prefetching, the fused loss, signals."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from kdlib import batching, localize, models, precision
from kdlib.batching import prefetched
from kdlib.errors import ArgumentError, TrainingError
from kdlib.gradients import StudentLoss, add_gradient, attached
from kdlib.heads import Head
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.precision import Precision
from kdlib.stopping import stop_on_signals
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import Stopped, TrainConfig, accumulate_gradient, train
from kdlib.views import PairedBatch

CPU = torch.device("cpu")
HARD = Objective(hard_weight=1.0)
CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2, checkpoint_every=2)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("teacher")[1]


@pytest.fixture(scope="module")
def collator(tokenizer):
    return PairCollator(tokenizer)


@pytest.fixture(scope="module")
def pairs(collator):
    examples = localize.examples("train", locales=["fr"], limit=6)
    return [collator.encode(e, i) for i, e in enumerate(examples)]


@pytest.fixture
def student(tokenizer):
    return small(tokenizer)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    return LiveTeacher(small(tokenizer, seed=1))


def small(tokenizer, seed=0):
    return models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# --- Precision ---


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_a_card_gets_what_it_computes_natively(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    # What a T4 answers: it can, by emulation.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    device = torch.device("cuda")
    assert Precision.choose("auto", device) == Precision(chosen, "cuda")
    assert Precision.choose("fp32", device).name == "fp32"
    if chosen == "fp16":
        with pytest.raises(ArgumentError, match="bf16' on a card"):
            Precision.choose("bf16", device)


def test_other_devices_compute_in_float32():
    assert Precision.choose("auto", CPU).name == "fp32"
    assert Precision.choose("auto", torch.device("mps")).name == "fp32"
    assert not Precision.choose("auto", CPU).scaler().is_enabled()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_weights_stay_float32_and_products_are_in_16_bits(
    student, teacher, collator, pairs, name
):
    seen = set()
    student.lm_head.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    teacher.model.lm_head.register_forward_hook(
        lambda m, i, out: seen.add(("teacher", out.dtype))
    )
    config = replace(CONFIG, precision=name)
    train(student, pairs, collator, Objective(), config, teacher=teacher)
    assert seen == {precision.DTYPES[name], ("teacher", torch.float32)}
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_16_bits_give_nearly_the_gradient_of_32(student, teacher, collator, pairs):
    found = {}
    for name in ("fp32", "bf16"):
        loss_of = StudentLoss(
            student, Objective(), teacher, precision=Precision(name, "cpu")
        )
        student.zero_grad()
        add_gradient(loss_of, [collator.collate(pairs)])
        found[name] = gradients(student)
    gap = (found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 0 < gap < 0.02


def test_fp16_clips_the_gradient_and_not_its_scaled_double(tokenizer, collator, pairs):
    norms = []
    for name in ("fp32", "fp16"):
        config = replace(CONFIG, precision=name)
        student = small(tokenizer)
        history = train(student, pairs, collator, HARD, config)
        norms.append(history.grad_norm)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_a_step_that_overflows_in_fp16_is_left_out(student, collator, pairs):
    class Steep:
        """Targets whose loss has a gradient beyond float16, times the scale."""

        def targets(self, batch):
            logits = torch.zeros(len(batch.response_ids), 1024)
            logits[:, 0] = 1e6
            return logits

    config = replace(CONFIG, steps=2, precision="fp16")
    before, after = weights(student), []

    def on_step(step, loss):
        after.append(weights(student))

    objective = Objective("reverse_kl")
    history = train(
        student, pairs, collator, objective, config, teacher=Steep(), on_step=on_step
    )
    assert not math.isfinite(history.grad_norm[0]) and math.isfinite(history.loss[0])
    assert torch.equal(after[0], before)


def test_fp16_that_overflows_at_every_scale_is_an_error():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-15)
    parameter = torch.nn.Parameter(torch.zeros(1))
    scaler.scale(parameter.sum()).backward()  # makes its scale
    with pytest.raises(TrainingError, match="overflow in fp16"):
        precision.check_scale(scaler, 3)
    off = torch.amp.GradScaler("cpu", enabled=False)
    precision.check_scale(off, 3)


def test_frozen_weights_stay_and_need_no_optimizer(student, collator, pairs):
    student.model.requires_grad_(False)
    student.model.norm.weight.requires_grad_(True)
    before = {name: p.clone() for name, p in student.named_parameters()}
    train(student, pairs, collator, HARD, CONFIG)
    changed = {
        n for n, p in student.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == {"model.norm.weight"}


# --- The order of the examples ---


def test_skipping_leads_to_the_same_place(collator, pairs):
    def ids(step):
        return [batch.example_ids.tolist() for batch in step]

    config = replace(CONFIG, micro_batch_size=3)
    steps = batching.batches_of_steps(pairs, collator, config, CPU)
    whole = [ids(step) for step in itertools.islice(steps, 11)]
    for skip in (1, 3, 7):  # an epoch has 3 batches
        steps = batching.batches_of_steps(pairs, collator, config, CPU, skip=skip)
        assert [ids(s) for s in itertools.islice(steps, 11 - skip)] == whole[skip:]
    assert sorted(sum(itertools.chain(*whole[:3]), [])) == list(range(len(pairs)))


def test_prefetching_keeps_items_order_and_errors():
    def items():
        yield from range(5)
        raise ValueError("broken example")

    got = []
    with pytest.raises(ValueError, match="broken example"):
        for item in prefetched(items()):
            got.append(item)
    assert got == list(range(5))
    assert list(prefetched(iter("abc"))) == ["a", "b", "c"]


def test_prefetching_works_ahead_in_one_thread_and_ends_with_its_reader():
    made, two = [], threading.Event()

    def items():
        for i in itertools.count():
            made.append((i, threading.current_thread().name))
            if i == 1:
                two.set()
            yield i

    reader = prefetched(items())
    assert next(reader) == 0
    assert two.wait(10)  # the second item is made before anyone asks for it
    reader.close()
    assert {name for _, name in made} == {"kdlib-prefetch"}
    assert len(made) <= 4  # and not the whole data set
    assert "kdlib-prefetch" not in {t.name for t in threading.enumerate()}


def test_a_gpu_gets_the_same_batches_in_the_same_order(collator, pairs, monkeypatch):
    applied = []

    def each(batch, f):
        applied.append(f)
        return batch

    monkeypatch.setattr(PairedBatch, "map", each)
    found = []
    for name in ("cpu", "cuda"):
        steps = batching.batches_of_steps(
            pairs, collator, CONFIG, torch.device(name), skip=2
        )
        first = list(itertools.islice(steps, 5))
        steps.close()
        found.append([[b.example_ids.tolist() for b in step] for step in first])
    assert found[0] == found[1] and len(found[0]) == 5
    assert torch.Tensor.pin_memory in applied
    assert "kdlib-prefetch" not in {t.name for t in threading.enumerate()}


def test_map_reaches_every_tensor_of_a_batch(collator, pairs):
    batch = collator.collate(pairs[:3])
    seen = []
    again = batch.map(lambda x: seen.append(x) or x.clone())
    assert len(seen) == 12  # the positions of each view among them
    assert torch.equal(again.teacher.input_ids, batch.teacher.input_ids)
    assert again.teacher.input_ids is not batch.teacher.input_ids
    assert torch.equal(again.truncated, batch.truncated)
    assert replace(batch, truncated=None).map(torch.clone)


def test_the_hash_sees_every_id_and_their_order(pairs):
    known = {batching.data_hash(pairs), batching.data_hash(pairs[::-1])}
    for field in ("teacher_prompt_ids", "student_prompt_ids", "response_ids"):
        ids = [*getattr(pairs[3], field)]
        ids[-1] += 1
        changed = [*pairs[:3], replace(pairs[3], **{field: ids}), *pairs[4:]]
        known.add(batching.data_hash(changed))
    # A token that moves from the end of one part to the start of the next.
    first = pairs[0]
    moved = replace(
        first,
        teacher_prompt_ids=first.teacher_prompt_ids[:-1],
        student_prompt_ids=first.teacher_prompt_ids[-1:] + first.student_prompt_ids,
    )
    known.add(batching.data_hash([moved, *pairs[1:]]))
    known.add(batching.data_hash([replace(first, example_id=99), *pairs[1:]]))
    assert len(known) == 7


# --- The fused loss ---


def gemma(tokenizer, seed):
    """A model with a soft-capped, scaled head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=5.0,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("family", [small, gemma])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "hard_weight": 0.3},
        {"temperature": 2.0, "scale_by_t2": False, "divergence": "reverse_kl"},
        {"divergence": "skew_kl", "divergence_params": {"alpha": 0.3}},
    ],
)
def test_the_fused_loss_and_gradient_are_those_of_the_plain_path(
    tokenizer, collator, pairs, family, reduction, options
):
    # In float64, so that what is equal is equal to many digits.
    model, teacher = family(tokenizer, 0).double(), family(tokenizer, 1).double()
    teacher = LiveTeacher(teacher)
    objective = Objective(reduction=reduction, **options)
    batches = [collator.collate(pairs[:5]), collator.collate(pairs[5:])]
    found = {}
    for fused in (False, True):
        loss_of = StudentLoss(model.eval(), objective, teacher, fused=fused)
        model.zero_grad()
        step = add_gradient(loss_of, batches, measure=True).fetch()[0]
        found[fused] = step, gradients(model)
    (plain, wanted), (fused, gradient) = found[False], found[True]
    assert fused.loss == pytest.approx(plain.loss, rel=1e-9)
    for name, part in fused.parts.items():
        assert part == pytest.approx(plain.parts[name], rel=1e-9)
    assert set(fused.parts) >= {"soft"} | ({"hard"} if objective.hard_weight else set())
    for name, value in fused.fidelity.items():
        assert value == pytest.approx(plain.fidelity[name], rel=1e-6, abs=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-10)
    assert (fused.rows, fused.tokens, fused.teacher_tokens) == (
        plain.rows,
        plain.tokens,
        plain.teacher_tokens,
    )


@pytest.mark.parametrize("tail", ["bucket", "sampled"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_the_fused_loss_of_cached_targets_is_that_of_the_plain_path(
    tokenizer, collator, pairs, tmp_path, tail, hard_weight
):
    model = gemma(tokenizer, 0).double()
    batches = [collator.collate(pairs[:5]), collator.collate(pairs[5:])]
    live = LiveTeacher(gemma(tokenizer, 1))
    path = write_cache(tmp_path / "cache", live, batches, tokenizer, tail=tail)
    teacher = CachedTeacher(path, tokenizer)
    objective = Objective(hard_weight=hard_weight)
    found = {}
    for fused in (False, True):
        loss_of = StudentLoss(model.eval(), objective, teacher, fused=fused)
        model.zero_grad()
        step = add_gradient(loss_of, batches, measure=True).fetch()[0]
        found[fused] = step, gradients(model)
    (plain, wanted), (fused, gradient) = found[False], found[True]
    assert fused.loss == pytest.approx(plain.loss, rel=1e-9)
    assert fused.parts["soft"] == pytest.approx(plain.parts["soft"], rel=1e-9)
    assert fused.fidelity == pytest.approx(plain.fidelity, rel=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    # What is known before the step is not asked for again.
    ahead = [replace(batch, targets=teacher.targets(batch)) for batch in batches]
    loss_of = StudentLoss(model.eval(), objective, None)
    model.zero_grad()
    step = add_gradient(loss_of, ahead).fetch()[0]
    assert step.loss == plain.loss


def test_a_fused_run_ends_near_a_plain_one(tokenizer, teacher, collator, pairs):
    ends = []
    for fused in (False, True):
        student = small(tokenizer)
        config = replace(CONFIG, fused=fused, micro_batch_size=3)
        train(student, pairs, collator, Objective(), config, teacher=teacher)
        ends.append(weights(student))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-5)


# --- Options that change how, not what ---


def test_activation_checkpointing_gives_the_same_run(
    tokenizer, teacher, collator, pairs
):
    ends, blocks = [], []
    for on in (False, True):
        student = small(tokenizer)
        passes = []
        student.model.layers[0].mlp.register_forward_pre_hook(
            lambda *a, passes=passes: passes.append(1)
        )
        config = replace(CONFIG, activation_checkpointing=on)
        train(student, pairs, collator, Objective(), config, teacher=teacher)
        ends.append(weights(student))
        blocks.append(len(passes))
        assert not any(
            getattr(m, "gradient_checkpointing", 0) for m in student.modules()
        )
    assert torch.equal(*ends)
    assert blocks == [CONFIG.steps, 2 * CONFIG.steps]  # once more in the backward pass


def test_compile_takes_both_models_and_is_taken_back(
    student, teacher, collator, pairs, monkeypatch
):
    compiled = []

    def compile(self, **options):
        compiled.append((self, options))
        self._compiled_call_impl = self._call_impl

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    config = replace(CONFIG, compile=True)
    train(student, pairs, collator, Objective(), config, teacher=teacher)
    blocks = [*student.model.layers, *teacher.model.model.layers]
    assert compiled == [(block, {}) for block in blocks]
    assert all(block._compiled_call_impl is None for block in blocks)


@pytest.mark.parametrize("fused", [False, True])
def test_an_offloaded_teacher_is_there_for_its_forward_pass(
    tokenizer, collator, pairs, monkeypatch, fused
):
    ends, events = [], []
    for offload in (False, True):
        student, model = small(tokenizer), small(tokenizer, seed=1)
        if offload:
            model.model.register_forward_hook(lambda *a: events.append("forward"))
            monkeypatch.setattr(model, "to", lambda device: events.append(str(device)))
        config = replace(
            CONFIG, micro_batch_size=2, fused=fused, teacher_offload=offload
        )
        teacher = LiveTeacher(model)
        train(student, pairs, collator, Objective(), config, teacher=teacher)
        ends.append(weights(student))
    assert torch.equal(*ends)
    if fused:
        events = events[2:]  # the head was compared with the model's logits
    # On a GPU the first of the three is "cuda:0", and so is the last of all.
    assert events == ["cpu", "forward", "cpu"] * (2 * CONFIG.steps) + ["cpu"]


def test_an_offloaded_teachers_head_stays(tokenizer):
    """`to` gives a parameter other data: in another dtype here, elsewhere on a GPU."""
    model = small(tokenizer)
    before = model.lm_head.weight.detach().clone()
    head = attached(Head.of(model), model, trained=False)
    model.to(torch.float64)
    assert torch.equal(head.weight, before) and head.weight.dtype == torch.float32
    assert not head.weight.requires_grad
    assert attached(head, model, trained=True).weight is model.lm_head.weight


# --- Signals ---

main_thread_only = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(),
    reason="Python handles signals in the main thread alone",
)


@main_thread_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_steps_and_it_goes_on(
    tokenizer, teacher, collator, pairs, tmp_path, capsys, number
):
    def run(student, folder, on_step=None):
        return train(
            student,
            pairs,
            collator,
            Objective(),
            CONFIG,
            teacher=teacher,
            folder=folder,
            on_step=on_step,
        )

    before = signal.getsignal(number)
    student, done = small(tokenizer), []

    def on_step(step, loss):
        done.append(step)
        if step == 3:  # not a step with a checkpoint of its own
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match="after step 3") as stopped:
        run(student, tmp_path / "a", on_step)
    assert done == [1, 2, 3] and not student.training
    assert stopped.value.signal == number and stopped.value.step == 3
    assert stopped.value.checkpoint.name == "step-00000003"
    assert f"{number.name}: finishing this step" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    again = small(tokenizer, seed=7)  # what it begins with does not matter
    history = run(again, tmp_path / "a")
    undisturbed = small(tokenizer)
    assert history.loss == run(undisturbed, tmp_path / "b").loss
    assert torch.equal(weights(again), weights(undisturbed))


@main_thread_only
def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # the first is being obeyed
            reached.append(stop.name)
            signal.raise_signal(signal.SIGINT)
            reached.append("the line after")
    assert reached == ["SIGTERM"]
    after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert after == before


def test_outside_the_main_thread_signals_are_left_alone():
    handlers = []

    def work():
        with stop_on_signals():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


@main_thread_only
def test_without_a_folder_ctrl_c_interrupts_as_ever(student, collator, pairs):
    def on_step(step, loss):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        train(student, pairs, collator, HARD, CONFIG, on_step=on_step)
    assert not isinstance(raised.value, Stopped)
    assert not student.training


# --- Going on ---


def test_a_finished_run_is_loaded_and_not_trained_again(
    tokenizer, teacher, collator, pairs, tmp_path
):
    first, second = small(tokenizer), small(tokenizer, seed=7)
    done = []
    for student in (first, second):
        train(
            student,
            pairs,
            collator,
            Objective(),
            CONFIG,
            teacher=teacher,
            folder=tmp_path,
            on_step=lambda step, loss: done.append(step),
        )
    assert done == list(range(1, 7))
    assert torch.equal(weights(first), weights(second))


def test_a_resumed_run_may_compute_otherwise(
    tokenizer, teacher, collator, pairs, tmp_path
):
    """After "out of memory" a run goes on with smaller micro-batches."""

    def run(student, config, on_step=None):
        return train(
            student,
            pairs,
            collator,
            Objective(),
            config,
            teacher=teacher,
            folder=tmp_path,
            on_step=on_step,
        )

    calls = []

    def full(step, loss):
        calls.append(step)
        if step == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(small(tokenizer), CONFIG, full)
    other = replace(CONFIG, micro_batch_size=1, log_every=1, keep_checkpoints=1)
    history = run(small(tokenizer), other, lambda step, loss: calls.append(step))
    assert calls == [1, 2, 3, 4, 3, 4, 5, 6] and len(history.loss) == 6


def test_with_a_folder_the_training_is_the_same(
    tokenizer, teacher, collator, pairs, tmp_path
):
    ends = []
    for folder in (None, tmp_path):
        student = small(tokenizer)
        train(
            student,
            pairs,
            collator,
            Objective(),
            CONFIG,
            teacher=teacher,
            folder=folder,
        )
        ends.append(weights(student))
    assert torch.equal(*ends)


# --- Settings that the loop uses ---


def test_the_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1, final_rate=0.2)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[9] == pytest.approx(10 / 11)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    # Half way down, and at the end: 0.2 + 0.8 (1 + cos(pi x)) / 2.
    assert rates[50] == pytest.approx(0.6)
    assert rates[99] == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.99 * math.pi)))


def test_gradients_are_clipped_to_the_length_asked_for(student, collator, pairs):
    lengths = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **options):
        total = sum(
            p.grad.pow(2).sum() for group in self.param_groups for p in group["params"]
        )
        lengths.append(math.sqrt(total))
        return step(self, *arguments, **options)

    config = replace(CONFIG, max_grad_norm=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        history = train(student, pairs, collator, HARD, config)
    assert lengths == pytest.approx([0.01] * 6, rel=1e-3)
    assert min(history.grad_norm) > 0.1  # before clipping


def test_accumulation_is_independent_of_the_split(student, teacher, collator, pairs):
    objective = Objective(hard_weight=0.3)
    accumulate_gradient(student, [collator.collate(pairs)], objective, teacher)
    whole = gradients(student)
    student.zero_grad()
    parts = [collator.collate(pairs[:2]), collator.collate(pairs[2:])]
    step = accumulate_gradient(student, parts, objective, teacher)
    torch.testing.assert_close(gradients(student), whole, rtol=1e-4, atol=1e-6)
    assert step.rows == len(pairs)
