"""The live teacher: no gradient, no dropout, its own dtype, and who it is."""

from __future__ import annotations

import pytest
import torch

from kdlib import localize, models
from kdlib.pairs import PairCollator
from kdlib.teachers import LiveTeacher


@pytest.fixture(scope="module")
def tokenizer():
    return models.load("teacher")[1]


@pytest.fixture(scope="module")
def batch(tokenizer):
    examples = localize.examples("test", locales=["fr"], limit=3)
    return PairCollator(tokenizer)(examples)


def small(tokenizer, seed=0):
    return models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=seed)


def test_targets_are_the_logits_before_each_response_token(tokenizer, batch):
    model = small(tokenizer).double()
    targets = LiveTeacher(model).targets(batch)
    assert len(targets) == len(batch.response_ids)
    row = 1
    real = batch.teacher.input_ids[row][batch.teacher.attention_mask[row]]
    with torch.no_grad():
        alone = model(input_ids=real[None]).logits[0]
    length = int((batch.row_ids == row).sum())
    torch.testing.assert_close(
        targets[batch.row_ids == row], alone[-length - 1 : -1], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_targets_have_the_models_dtype_and_no_gradient(tokenizer, batch, dtype):
    targets = LiveTeacher(small(tokenizer).to(dtype)).targets(batch)
    assert targets.dtype == dtype and not targets.requires_grad
    # They may be saved for the student's backward pass.
    student = torch.zeros_like(targets, requires_grad=True)
    (student * targets).sum().backward()
    assert torch.equal(student.grad, targets)


def test_dropout_is_off(tokenizer, batch):
    model = small(tokenizer)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    teacher = LiveTeacher(model)
    assert torch.equal(teacher.targets(batch), teacher.targets(batch))


def test_a_fingerprint_tells_models_apart(tokenizer, tmp_path):
    model = small(tokenizer)
    wanted = LiveTeacher(model).fingerprint()
    assert LiveTeacher(small(tokenizer)).fingerprint() == wanted
    again, _ = models.load(models.save(model, tokenizer, tmp_path / "m"))
    assert LiveTeacher(again).fingerprint() == wanted
    others = [small(tokenizer, seed=1), small(tokenizer).bfloat16(), small(tokenizer)]
    with torch.no_grad():  # one bit of one weight
        weight = others[2].lm_head.weight
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    others.append(small(tokenizer))
    others[3].config.rms_norm_eps *= 2  # a model is more than its weights
    seen = {wanted, *(LiveTeacher(other).fingerprint() for other in others)}
    assert len(seen) == 5


def test_signs_are_the_same_in_every_dtype_and_not_after_one_step(tokenizer):
    def signs(model):
        return LiveTeacher(model).signs()

    def seeded(dtype=torch.float32, seed=0):
        return small(tokenizer, seed).to(dtype)

    wanted = signs(seeded())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert signs(seeded(dtype)) == wanted
    tiny = seeded()
    with torch.no_grad():
        tiny.lm_head.weight.mul_(1e-12)  # all zero in float16, with their signs
    assert signs(tiny) == signs(tiny.half()) == wanted
    assert signs(seeded(seed=1)) != wanted
    assert signs(seeded().requires_grad_(False)) == wanted
    # Fine-tuned a little.
    tuned = seeded()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-4)
    tuned(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    assert signs(tuned) != wanted


def test_signs_of_a_large_tensor_are_of_a_spread_of_it(tokenizer, monkeypatch):
    monkeypatch.setattr("kdlib.teachers.SIGNS", 10)
    model = small(tokenizer)
    weight = model.lm_head.weight.detach().view(-1)  # 16,384 of them: every 1639th
    seen = []
    for place in (0, 1, 1639, 9 * 1639, len(weight) - 1):
        weight[place] *= -1
        seen.append(LiveTeacher(model).signs())
        weight[place] *= -1
    wanted = LiveTeacher(model).signs()
    assert [found != wanted for found in seen] == [True, False, True, True, False]
