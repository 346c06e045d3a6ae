"""sampling.py against the probabilities of every sequence a tiny model can write."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast

from kdlib import models, sampling
from kdlib.errors import ArgumentError, DataError
from kdlib.sampling import complete, draw

PAD, END, A, B = range(4)
# Two lengths, so that one of them stands in a padded row.
PROMPTS = [[A, B, B, A, B], [B, A]]


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "<end>": END, "a": A, "b": B}
    backend = Tokenizer(WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>"
    )


@pytest.fixture
def model(tokenizer):
    return small(tokenizer)


def small(tokenizer):
    model = models.build(tokenizer, hidden_size=16, layers=2, heads=2, seed=3).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)  # every outcome is likely enough to be counted
    return model.eval()


def exact(model, prompt, length, temperature=1.0) -> dict[tuple, float]:
    """The probability of everything that can follow: no cache, padding or batch."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for ids, probability in found.items():
            if ids[-1:] == (END,):
                longer[ids] = probability
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits
            odds = (logits[0, -1] / temperature).softmax(-1).tolist()
            longer |= {(*ids, i): probability * p for i, p in enumerate(odds)}
        found = longer
    return found


def excess(samples, expected) -> float:
    """Pearson's chi-square, in standard deviations above its mean."""
    counts, n = Counter(map(tuple, samples)), len(samples)
    assert counts.keys() <= expected.keys()
    chi2 = sum((counts[ids] - n * p) ** 2 / (n * p) for ids, p in expected.items())
    freedom = len(expected) - 1
    return (chi2 - freedom) / math.sqrt(2 * freedom)


# --- What is drawn ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_token_is_drawn_with_exactly_its_probability(temperature):
    logits = torch.tensor([1.0, -2.0, -torch.inf, 0.5, -torch.inf], dtype=torch.float64)
    n = 10_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    drawn = draw(logits.expand(n, -1), u, temperature)
    share = torch.bincount(drawn, minlength=5) / n
    expected = (logits / temperature).softmax(-1)
    assert (share - expected).abs().max() <= 1 / n
    assert share[2] == share[4] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("vocab", [3, 1000, 200_000])
def test_the_ends_of_the_interval_stay_in_the_vocabulary(monkeypatch, vocab, dtype):
    monkeypatch.setattr(sampling, "widest", lambda device: dtype)
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, [0, -1]] = -torch.inf
    (drawn,) = draw(logits, torch.zeros(1, dtype=torch.float64), 1.0).tolist()
    assert drawn == 1
    last = torch.tensor([math.nextafter(1, 0)], dtype=torch.float64)
    (drawn,) = draw(logits, last, 1.0).tolist()
    assert 0.9 * (vocab - 2) <= drawn < vocab - 1


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_samples_have_the_models_probabilities(model, tokenizer, temperature):
    n, length = 3000, 3
    prompts = PROMPTS * n
    samples = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=length,
        batch_size=2500,
        temperature=temperature,
        keep_end=True,
    )
    for k, prompt in enumerate(PROMPTS):
        right = exact(model, prompt, length, temperature)
        assert sum(right.values()) == pytest.approx(1)
        assert excess(samples[k::2], right) < 4
        # It would be seen: another temperature, or the other prompt.
        for wrong in (
            exact(model, prompt, length, 1.5 * temperature),
            exact(model, PROMPTS[1 - k], length, temperature),
        ):
            assert excess(samples[k::2], wrong) > 6


def test_greedy_takes_the_likeliest_token(model, tokenizer):
    (answer,) = complete(model, tokenizer, PROMPTS[:1], max_new_tokens=4, keep_end=True)
    expected = []
    while len(expected) < 4 and END not in expected:
        logits = model(input_ids=torch.tensor([PROMPTS[0] + expected])).logits
        expected.append(int(logits[0, -1].argmax()))
    assert answer == expected
    (cold,) = complete(
        model,
        tokenizer,
        PROMPTS[:1],
        max_new_tokens=4,
        temperature=1e-6,
        keep_end=True,
    )
    assert cold == expected


def test_a_completion_depends_on_its_own_seed_alone(model, tokenizer):
    prompts = [list(p) for k in (1, 2, 3) for p in itertools.product([A, B], repeat=k)]
    seeds = [f"seed {i}" for i in range(len(prompts))]

    def sample(order, batch_size):
        found = complete(
            model,
            tokenizer,
            [prompts[i] for i in order],
            max_new_tokens=8,
            batch_size=batch_size,
            temperature=1.0,
            seeds=[seeds[i] for i in order],
        )
        return dict(zip(order, found, strict=True))

    order = list(range(len(prompts)))
    together = sample(order, 256)
    assert together == sample(order, 1) == sample(order[::-1], 3)
    seeds = seeds[::-1]
    assert together != sample(order, 256)


def test_a_cut_completion_has_no_end_and_an_ended_one_keeps_it_if_asked(tokenizer):
    model = small(tokenizer)
    sampled = {"temperature": 1.0, "max_new_tokens": 4}
    kept = complete(model, tokenizer, PROMPTS * 50, keep_end=True, **sampled)
    bare = complete(model, tokenizer, PROMPTS * 50, **sampled)
    ended = [ids[-1] == END for ids in kept]
    assert any(ended) and not all(ended)
    for with_end, without, has_ended in zip(kept, bare, ended, strict=True):
        assert without == (with_end[:-1] if has_ended else with_end)
        assert has_ended or len(without) == 4
        assert END not in without


def test_columns_beyond_the_tokenizer_are_never_written(tokenizer):
    model = small(tokenizer)
    model.resize_token_embeddings(8)
    with torch.no_grad():
        # On average the likeliest by far, were it not for the tokenizer's end.
        model.get_input_embeddings().weight[4:] *= 50
    for temperature in (0.0, 1.0):
        found = complete(
            model,
            tokenizer,
            PROMPTS * 20,
            max_new_tokens=5,
            stop_at_end=False,
            temperature=temperature,
        )
        assert {id_ for ids in found for id_ in ids} <= {PAD, A, B}
        assert {len(ids) for ids in found} == {5}


# --- What is left alone -------------------------------------------------------------


def test_the_models_own_settings_do_not_shape_its_answers_and_stay(model, tokenizer):
    def answers(temperature):
        return complete(
            model,
            tokenizer,
            PROMPTS * 20,
            max_new_tokens=6,
            temperature=temperature,
            keep_end=True,
        )

    plain = answers(0.0), answers(1.0)
    settings = GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[A],
        min_new_tokens=6,
        use_cache=False,
        eos_token_id=B,
    )
    model.generation_config = settings
    before = settings.to_dict()
    assert (answers(0.0), answers(1.0)) == plain
    assert model.generation_config is settings and settings.to_dict() == before


def test_mode_settings_and_random_states_are_as_before(tokenizer):
    model = small(tokenizer)
    model.train()
    model.model.layers[0].eval()  # somebody has frozen a part of it
    modes = [module.training for module in model.modules()]
    settings = model.generation_config
    states = torch.get_rng_state(), random.getstate()
    complete(model, tokenizer, PROMPTS, max_new_tokens=3, temperature=1.0)

    def fails(*args, **kwargs):
        raise RuntimeError("no memory")

    model.forward = fails
    with pytest.raises(RuntimeError, match="no memory"):
        complete(model, tokenizer, PROMPTS, max_new_tokens=3, temperature=1.0)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_it_writes_in_eval_mode_with_a_cache_and_without_a_gradient(tokenizer):
    model = small(tokenizer)
    model.train()
    seen = []

    def look(module, args, kwargs, output):
        seen.append((module.training, kwargs["input_ids"].shape[1]))
        assert not output.logits.requires_grad

    model.register_forward_hook(look, with_kwargs=True)
    complete(
        model, tokenizer, PROMPTS, max_new_tokens=4, temperature=1.0, stop_at_end=False
    )
    assert seen == [(False, 5)] + [(False, 1)] * 3
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan])
def test_bad_options_are_refused(model, tokenizer, temperature):
    with pytest.raises(ArgumentError, match="temperature="):
        complete(model, tokenizer, PROMPTS, temperature=temperature)
    with pytest.raises(ArgumentError, match="3 seeds for 2 prompts"):
        complete(model, tokenizer, PROMPTS, seeds=[1, 2, 3])
    with pytest.raises(DataError, match="no token"):
        complete(model, tokenizer, [[A], []])
