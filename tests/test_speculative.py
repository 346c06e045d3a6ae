"""Speculative decoding: the answers are the large model's, shown by enumeration."""

from __future__ import annotations

import itertools
import statistics
from types import SimpleNamespace

import pytest
import torch

from kdlib import speculative
from kdlib.divergences import tvd
from kdlib.errors import ArgumentError
from kdlib.exact import ExactLM, sequences
from kdlib.speculative import overlap, residual, speculate, verify

DOUBLE = torch.float64


def distributions(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(shape, generator=rng, dtype=DOUBLE)).softmax(-1)


# --- One token ---


def test_by_hand():
    """p = (.7, .2, .1), q = (.5, .5, 0): min is (.5, .2, 0), p - q is (.2, -, .1)."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    q = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE)
    assert overlap(p, q).item() == pytest.approx(0.7)
    wanted = torch.tensor([2 / 3, 0, 1 / 3], dtype=DOUBLE)
    torch.testing.assert_close(residual(p, q), wanted)
    assert residual(p, p).tolist() == p.tolist()


def test_overlap_is_one_minus_the_total_variation():
    p, q = distributions(50, 8), distributions(50, 8, seed=1)
    torch.testing.assert_close(overlap(p, q), 1 - tvd(q.log(), p.log()))
    torch.testing.assert_close(overlap(p, q), 1 - 0.5 * (p - q).abs().sum(-1))


def law_of_verify(p, q, n):
    """P(what verify returns), summed over all drafts and over a grid of u.

    The grid is the middles of n equal parts. Where acceptances and the distributions
    drawn from are multiples of 1 / n, no edge lies inside a part: the sum is exact.
    """
    k, v = q.shape
    grid = [(i + 0.5) / n for i in range(n)]
    law = {}
    for drafted in itertools.product(range(v), repeat=k):
        chance = torch.stack([q[i, x] for i, x in enumerate(drafted)]).prod().item()
        if not chance:
            continue
        for u in itertools.product(grid, repeat=k + 1):
            said = tuple(verify(p, q, drafted, torch.tensor(u, dtype=DOUBLE)))
            law[said] = law.get(said, 0.0) + chance / n ** (k + 1)
    return law


def test_the_law_of_verify_is_the_large_model_s():
    """q in quarters and p in eighths: acceptances are halves or ones."""
    p = torch.tensor([[2, 4, 2], [4, 2, 2], [1, 2, 5]], dtype=DOUBLE) / 8
    q = torch.tensor([[2, 1, 1], [1, 1, 2]], dtype=DOUBLE) / 4
    law = law_of_verify(p, q, 8)
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    first = [sum(c for said, c in law.items() if said[0] == x) for x in range(3)]
    assert first == pytest.approx(p[0].tolist(), abs=1e-12)
    # Where a second token comes out, it is drawn from p's second place; so is a third.
    for place in (1, 2):
        longer = {s: c for s, c in law.items() if len(s) > place}
        total = sum(longer.values())
        found = [sum(c for s, c in longer.items() if s[place] == x) for x in range(3)]
        assert [f / total for f in found] == pytest.approx(p[place].tolist(), abs=1e-12)
        kept = overlap(p[:place], q[:place]).prod().item()
        assert total == pytest.approx(kept, abs=1e-12)


@pytest.mark.parametrize("short", ("p", "q", "drafted", "u"))
def test_rows_that_do_not_fit_are_refused(short):
    given = {"p": distributions(3, 4), "q": distributions(2, 4), "drafted": [0, 1]}
    given["u"] = torch.rand(3)
    given[short] = given[short][:-1]
    with pytest.raises(ArgumentError, match="one row more"):
        verify(**given)


# --- Whole answers ---

V, LENGTH, END = 3, 3, 2


class Enumerable:
    """An ExactLM that reads like a causal LM, after a prompt of one token."""

    def __init__(self, seed):
        self.exact = ExactLM.random(vocab=V, length=LENGTH + 2, scale=1.5, seed=seed)
        self.passes = 0

    def __call__(self, ids, use_cache=False):
        self.passes += 1
        rows = []
        for n in range(ids.shape[1]):
            prefix = ids[0, 1 : n + 1].tolist()
            place = sum(x * V**i for i, x in enumerate(reversed(prefix)))
            rows.append(self.exact.tables[len(prefix)][0, place])
        return SimpleNamespace(logits=torch.stack(rows)[None])

    def after(self, prefix):
        return self(torch.tensor([[0, *prefix]])).logits[0, -1].softmax(-1)


def answers(model):
    """Each answer that ends, or has LENGTH tokens, with its probability."""
    found = {}

    def walk(prefix, chance):
        if len(prefix) == LENGTH or END in prefix:
            found[prefix] = chance
            return
        for x, p in enumerate(model.after(prefix).tolist()):
            walk((*prefix, x), chance * p)

    walk((), 1.0)
    return found


class Script:
    """One run's choices. Where the script ends, the first is taken, the rest kept."""

    def __init__(self, choices):
        self.choices, self.place, self.chance, self.others = choices, 0, 1.0, []

    def choose(self, probabilities):
        if self.place == len(self.choices):
            self.others += [
                [*self.choices, other]
                for other, p in enumerate(probabilities)
                if other and p > 0
            ]
            self.choices.append(0)
        taken = self.choices[self.place]
        self.place += 1
        self.chance *= probabilities[taken]
        return taken

    def drawn(self, p, u):
        return self.choose(p.tolist())

    def verify(self, p, q, drafted, u):
        """kdlib's, with u in the middle of the values that keep a token, or do not."""
        us = []
        for row, x in enumerate(drafted):
            a = min(1.0, (p[row, x] / q[row, x]).item())
            kept = self.choose([a, 1 - a]) == 0
            us.append(a / 2 if kept else (1 + a) / 2)
            if not kept:
                break
        us += [0.5] * (len(u) - len(us))
        return verify(p, q, drafted, torch.tensor(us, dtype=DOUBLE))


def told(monkeypatch, large, small, ahead):
    """The law of `speculate`, and its mean counts: every draw of it is branched."""
    law, counts = {}, dict.fromkeys(("judged", "kept", "expected", "passes"), 0.0)
    branches = [[]]
    while branches:
        script = Script(branches.pop())
        monkeypatch.setattr(speculative, "_drawn", script.drawn)
        monkeypatch.setattr(speculative, "verify", script.verify)
        said = speculate(
            large, small, [0], [0], ahead=ahead, end=END, max_new_tokens=LENGTH
        )
        branches += script.others
        law[tuple(said.ids)] = law.get(tuple(said.ids), 0.0) + script.chance
        for name in counts:
            counts[name] += script.chance * getattr(said, name)
    monkeypatch.undo()
    return law, counts


@pytest.mark.parametrize("ahead", (1, 2))
def test_the_law_of_whole_answers_is_the_large_model_s(monkeypatch, ahead):
    large, small = Enumerable(1), Enumerable(2)
    law, counts = told(monkeypatch, large, small, ahead)
    wanted = answers(large)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-12)
    assert set(law) == set(wanted)
    for answer, chance in wanted.items():
        assert law[answer] == pytest.approx(chance, abs=1e-12), answer
    # Kept tokens: on average the sum of 1 - TVD over the judged ones, and no more.
    assert counts["kept"] == pytest.approx(counts["expected"], abs=1e-12)
    assert 0 < counts["kept"] < counts["judged"]


def test_a_draft_that_is_the_large_model_is_kept_whole(monkeypatch):
    law, counts = told(monkeypatch, Enumerable(1), Enumerable(1), 2)
    assert counts["kept"] == pytest.approx(counts["judged"], abs=1e-12)
    wanted = answers(Enumerable(1))
    assert law == pytest.approx(wanted, abs=1e-12)


def test_by_count_the_share_kept_is_one_minus_the_total_variation():
    """800 answers of real draws, within four standard deviations (seeds are fixed)."""
    large, small = Enumerable(1), Enumerable(2)
    runs = [
        speculate(
            large, small, [0], [0], ahead=2, end=END, seed=s, max_new_tokens=LENGTH
        )
        for s in range(800)
    ]
    apart = [run.kept - run.expected for run in runs]  # mean zero, whatever the draft
    noise = statistics.stdev(apart) / len(apart) ** 0.5
    assert abs(statistics.mean(apart)) < 4 * noise and noise < 0.03
    wanted = answers(large)
    for answer, chance in wanted.items():
        count = sum(tuple(run.ids) == answer for run in runs)
        spread = (len(runs) * chance * (1 - chance)) ** 0.5
        assert abs(count - len(runs) * chance) < 4 * spread, answer


def test_what_is_counted():
    large, small = Enumerable(1), Enumerable(2)
    first = speculate(large, small, [0], [0], ahead=2, end=END, max_new_tokens=LENGTH)
    again = speculate(large, small, [0], [0], ahead=2, end=END, max_new_tokens=LENGTH)
    assert first == again
    assert large.passes == 2 * first.passes
    assert 0 <= first.kept <= first.judged
    with pytest.raises(ArgumentError, match="ahead=0"):
        speculate(large, small, [0], [0], ahead=0, end=END)


def test_the_enumerable_models_are_what_exact_says():
    """The adapter above reads ExactLM's own tables: its answers without an end."""
    exact = ExactLM.random(vocab=V, length=LENGTH, scale=1.5, seed=1)
    model = Enumerable(1)
    model.exact = exact
    for row, wanted in zip(
        sequences(V, LENGTH).tolist(), exact.log_probs()[0].exp(), strict=True
    ):
        chance = 1.0
        for place, x in enumerate(row):
            chance *= model.after(row[:place])[x].item()
        assert chance == pytest.approx(wanted.item(), abs=1e-12)
