"""What only a GPU can show: its kernels, its precisions, its memory, its waiting.

    pytest tests/test_gpu.py

Skipped without CUDA. All references are float64 on the CPU.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kdlib import localize, models
from kdlib.divergences import DIVERGENCES, get_divergence
from kdlib.errors import TrainingError
from kdlib.fused import fused_divergence, fused_sparse_divergence
from kdlib.heads import Head
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.settings import TrainConfig
from kdlib.sparse import sparse_divergence
from kdlib.sparse_targets import top_k_targets
from kdlib.teachers import CachedTeacher, LiveTeacher, write_cache
from kdlib.train import Stopped, train

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
)
CUDA = torch.device("cuda")
CONFIG = TrainConfig(
    steps=6, batch_size=8, learning_rate=3e-3, precision="fp32", checkpoint_every=2
)


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer("teacher")


@pytest.fixture(scope="module")
def collator(tokenizer):
    return PairCollator(tokenizer)


@pytest.fixture(scope="module")
def pairs(collator):
    examples = localize.examples("train", locales=["fr"], limit=16)
    return [collator.encode(e, i) for i, e in enumerate(examples)]


def small(tokenizer, seed=0, device=CUDA):
    model = models.build(tokenizer, hidden_size=64, layers=2, heads=2, seed=seed)
    return model.to(device)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def run(tokenizer, collator, pairs, config=CONFIG, device=CUDA, **options):
    student = small(tokenizer, device=device)
    if "teacher" not in options:
        options["teacher"] = LiveTeacher(small(tokenizer, 1, device))
    objective = options.pop("objective", Objective())
    history = train(student, pairs, collator, objective, config, **options)
    return student, history


# --- The loss: values and gradients against float64 on the CPU ---


def problem(rows, width, vocab, dtype, *, seed=0):
    """Hidden states and weights with logits of a trained model's spread; float64."""
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, width, generator=g) for _ in range(2)]
    made += [torch.randn(vocab, width, generator=g) * 3 / width**0.5 for _ in range(2)]
    return [x.to(dtype).double() for x in made]


def reference(h_s, h_t, w_s, w_t, name, temperature, labels, params):
    h, w = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()
    measure = get_divergence(name, **params)
    values = measure(h @ w.T, h_t @ w_t.T, temperature=temperature)
    total = values.sum()
    if labels is not None:
        total = total + 0.5 * F.cross_entropy(h @ w.T, labels, reduction="sum")
    return values.detach(), torch.autograd.grad(total, (h, w))


def error(found, wanted):
    return ((found.detach().double().cpu() - wanted).norm() / wanted.norm()).item()


# Relative errors, by what the operands are rounded to. In 16 bits the difference of two
# rounded distributions is what the loss is made of.
LIMITS = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (3e-2, 3e-2)}


@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "with labels"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_fused_loss(name, hard, dtype):
    rows, width, vocab = 300, 64, 5003
    h_s, h_t, w_s, w_t = problem(rows, width, vocab, dtype)
    labels = torch.arange(rows) * 7 if hard else None
    values, gradients = reference(h_s, h_t, w_s, w_t, name, 2.0, labels, {})
    leaves = [x.to(CUDA, dtype).requires_grad_() for x in (h_s, w_s)]
    options = {}
    if hard:
        options["labels"] = labels.cuda()
        options["label_weights"] = torch.full((rows,), 0.5, device=CUDA)
    found = fused_divergence(
        leaves[0],
        Head(leaves[1]),
        h_t.to(CUDA, dtype),
        Head(w_t.to(CUDA, dtype)),
        divergence=name,
        temperature=2.0,
        workspace=2**24,  # several chunks and panels
        **options,
    )
    value, gradient = LIMITS[dtype]
    if name == "tvd":  # its gradient is a sign, which turns where p_s is near p_t
        gradient = max(gradient, 5e-2)
    assert error(found.per_token, values) < value
    for got, want in zip(
        torch.autograd.grad(found.total, leaves), gradients, strict=True
    ):
        assert error(got, want) < gradient


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
@pytest.mark.parametrize("dtype", LIMITS, ids=["float32", "bfloat16"])
def test_the_fused_loss_of_sparse_targets(tail, dtype):
    h_s, h_t, w_s, w_t = problem(300, 64, 5003, dtype)
    targets = top_k_targets(h_t @ w_t.T, 16, tail)
    h, w = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()
    values = sparse_divergence(h @ w.T, targets)
    wanted = torch.autograd.grad(values.sum(), (h, w))
    leaves = [x.to(CUDA, dtype).requires_grad_() for x in (h_s, w_s)]
    found = fused_sparse_divergence(leaves[0], Head(leaves[1]), targets.to(CUDA))
    value, gradient = LIMITS[dtype]
    assert error(found.per_token, values.detach()) < value
    for got, want in zip(torch.autograd.grad(found.total, leaves), wanted, strict=True):
        assert error(got, want) < gradient


def test_a_vocabulary_of_qwen3_in_bfloat16():
    h_s, h_t, w_s, w_t = problem(32, 128, 151_936, torch.bfloat16)
    values, gradients = reference(h_s, h_t, w_s, w_t, "forward_kl", 1.0, None, {})
    leaves = [x.to(CUDA, torch.bfloat16).requires_grad_() for x in (h_s, w_s)]
    teacher = h_t.to(CUDA, torch.bfloat16), Head(w_t.to(CUDA, torch.bfloat16))
    found = fused_divergence(leaves[0], Head(leaves[1]), *teacher)
    assert error(found.per_token, values) < 1e-2
    for got, want in zip(
        torch.autograd.grad(found.total, leaves), gradients, strict=True
    ):
        assert error(got, want) < 3e-2


# --- The loop ---


@pytest.fixture(scope="module")
def on_a_cpu(tokenizer, collator, pairs):
    return run(tokenizer, collator, pairs, device=torch.device("cpu"))[1].loss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": True},
        {"micro_batch_size": 3},
        {"micro_batch_size": 3, "fused": True},
        {"activation_checkpointing": True},
        {"teacher_offload": True, "fused": True},
        {"compile": True, "fused": True},
    ],
    ids=str,
)
def test_float32_is_the_cpu_s_run(tokenizer, collator, pairs, on_a_cpu, options):
    config = replace(CONFIG, **options)
    teacher = small(tokenizer, 1, "cpu" if config.teacher_offload else CUDA)
    _, history = run(tokenizer, collator, pairs, config, teacher=LiveTeacher(teacher))
    assert history.loss == pytest.approx(on_a_cpu, rel=1e-3)
    if config.teacher_offload:
        assert next(teacher.parameters()).device.type == "cpu"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "auto"])
def test_16_bits_are_close(tokenizer, collator, pairs, on_a_cpu, precision, fused):
    config = replace(CONFIG, precision=precision, fused=fused)
    student, history = run(tokenizer, collator, pairs, config)
    assert history.loss == pytest.approx(on_a_cpu, rel=5e-2)
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_cached_targets(tokenizer, collator, pairs, tmp_path):
    live = LiveTeacher(small(tokenizer, 1))
    batches = (collator.collate([pair]) for pair in pairs)
    path = write_cache(tmp_path / "cache", live, batches, tokenizer, k=32)
    seen = {}
    for fused in (False, True):
        teacher = CachedTeacher(path, tokenizer)
        config = replace(CONFIG, fused=fused)
        seen[fused] = run(tokenizer, collator, pairs, config, teacher=teacher)[1].loss
    assert seen[True] == pytest.approx(seen[False], rel=1e-4)
    assert seen[True][-1] < seen[True][0]


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16", "fused": True},
        {"precision": "fp16"},
        {"lmbda": 1.0, "max_new_tokens": 8, "precision": "bf16"},
        {"sequence_level": True, "max_new_tokens": 8},
    ],
    ids=str,
)
def test_a_run_that_was_stopped_goes_on(
    tokenizer, collator, pairs, tmp_path, options, monkeypatch
):
    """Kernels may add in another order, so not bit for bit; what is drawn is equal."""
    config = replace(CONFIG, log_every=1, **options)
    whole = run(tokenizer, collator, pairs, config, folder=tmp_path / "whole")[1]

    class Killed(Exception):
        pass

    def kill(step, loss):
        if step == 5:
            raise Killed

    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        run(tokenizer, collator, pairs, config, folder=folder, on_step=kill)
    torch.cuda.manual_seed(99)  # the checkpoint's random state must come back
    student, history = run(tokenizer, collator, pairs, config, folder=folder)
    assert history.loss == pytest.approx(whole.loss, rel=1e-3)
    lines = [
        [json.loads(line)["tokens"] for line in open(place / "metrics.jsonl")]
        for place in (tmp_path / "whole", folder)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == config.steps


def test_metrics_tell_of_the_gpu(tokenizer, collator, pairs, tmp_path):
    config = replace(CONFIG, precision="bf16", fused=True, log_every=1)
    run(tokenizer, collator, pairs, config, folder=tmp_path)
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    for line in lines:
        assert 0 <= line["agreement"] <= 1 and line["kl"] >= 0
        assert 2**20 < line["peak_memory"] <= torch.cuda.max_memory_allocated()


def test_a_full_gpu_is_a_clear_error(tokenizer, collator, pairs, tmp_path):
    run(tokenizer, collator, pairs, replace(CONFIG, steps=2), folder=tmp_path / "a")
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.empty_cache()
    used = torch.cuda.memory_allocated()
    student, teacher = small(tokenizer), LiveTeacher(small(tokenizer, 1))
    torch.cuda.set_per_process_memory_fraction((used + 24 * 2**20) / total)
    config = replace(CONFIG, batch_size=256, steps=2)
    try:
        with pytest.raises(TrainingError, match="micro_batch_size=128.*fused=True"):
            train(student, pairs * 16, collator, Objective(), config, teacher=teacher)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_fused_loss_keeps_no_logits(tokenizer, collator, pairs):
    peaks = {}
    config = replace(CONFIG, steps=2, batch_size=256)
    for fused in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(tokenizer, collator, pairs * 16, replace(config, fused=fused))
        peaks[fused] = torch.cuda.max_memory_allocated() - before
    assert peaks[True] < peaks[False]


def test_a_step_waits_for_the_gpu_once(tokenizer, collator, pairs):
    """torch's own count of waits."""
    waits = []

    def count(step, loss):
        waits.append(len(caught))
        if step == 2:  # the first steps build the optimiser's state
            torch.cuda.set_sync_debug_mode("warn")

    config = replace(CONFIG, precision="bf16", fused=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(tokenizer, collator, pairs, config, on_step=count)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    each = [b - a for a, b in zip(waits[2:], waits[3:], strict=False)]
    print(each, {str(w.message)[:80] for w in caught})
    assert each and max(each) == 1


def test_stopped_by_a_signal(tokenizer, collator, pairs, tmp_path):
    import os
    import signal

    def stop(step, loss):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(tokenizer, collator, pairs, folder=tmp_path, on_step=stop)
    history = run(tokenizer, collator, pairs, folder=tmp_path)[1]
    assert len(history.loss) == CONFIG.steps


def test_lora(tokenizer, collator, pairs):
    pytest.importorskip("peft")

    student = models.add_lora(small(tokenizer), rank=4)
    teacher = LiveTeacher(small(tokenizer, 1))
    config = replace(CONFIG, precision="bf16")
    history = train(student, pairs, collator, Objective(), config, teacher=teacher)
    assert history.loss[-1] < history.loss[0]
