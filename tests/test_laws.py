"""The laws against losses that are known to be wrong, and known to be right."""

import dataclasses
import json
import math
import re
import sys

import pytest
import torch
from wrong_losses import CEU, RIGHT, WRONG

from kdlib import leaderboard as board
from kdlib import peers
from kdlib.divergences import DIVERGENCES
from kdlib.errors import ArgumentError
from kdlib.laws import BY_DESIGN, FAILED, LAWS, NOT_APPLICABLE, PASSED, frame, run
from kdlib.loss_under_test import (
    FORMULAS,
    REDUCTIONS,
    SPANS,
    LossUnderTest,
    differentiate,
    make_batch,
    truth,
)
from kdlib.own_losses import fused_loss, kdlib_losses, objective_loss, top_k_loss

OWN = kdlib_losses()


def by_law(loss):
    return {verdict.law: verdict for verdict in run(loss)}


def failed(loss):
    return {law: v for law, v in by_law(loss).items() if v.status == FAILED}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: w.loss.name)
def test_every_wrong_loss_is_caught_by_its_name(wrong):
    verdicts = failed(wrong.loss)
    for law, name in wrong.caught.items():
        assert law in verdicts, f"law {law} passed it"
        assert name in verdicts[law].bug
        assert verdicts[law].measured != verdicts[law].expected


@pytest.mark.parametrize("loss", RIGHT + OWN, ids=lambda loss: loss.name)
def test_no_right_loss_is_accused(loss):
    assert failed(loss) == {}


def test_the_tables_are_large_enough_and_named_apart():
    assert len(WRONG) >= 30 and len(RIGHT) >= 10
    names = [w.loss.name for w in WRONG] + [loss.name for loss in RIGHT]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_is_seen_to_fail_and_to_hold(law):
    assert any(law in wrong.caught for wrong in WRONG)
    for losses in (RIGHT, OWN):
        held = [x for x in losses if run(x, law)[0].status == PASSED]
        # the one knob without a jump among ours is kl_mix's
        assert held, f"law {law} holds for no right loss: is it asked at all?"


@pytest.mark.parametrize("law", LAWS)
def test_every_law_says_what_holds_why_and_what_it_catches(law):
    statement, _, rest = LAWS[law].question.__doc__.partition("Why:")
    why, _, bugs = rest.partition("Bugs:")
    assert statement.strip() and why.strip()
    assert re.search(r"museum \d|[\w-]+/[\w-]+#\d|row", bugs), "no provenance"


def test_fifteen_laws_and_three_identities():
    numbers = [str(n) for n in range(1, 16)]
    assert sorted(LAWS) == sorted([*numbers, "i1", "i2", "i3"])
    assert all(number == law.number for number, law in LAWS.items())


def test_three_identities_alone_catch_the_thirteen_bugs_of_the_lab():
    assert CEU == 13
    for wrong in WRONG[:CEU]:
        caught = {law for law in failed(wrong.loss) if law in ("i1", "i2", "i3")}
        # a shifted mask is a wrong gradient; only the value tells an entropy
        assert caught, wrong.loss.name


def test_every_divergence_of_kdlib_is_asked():
    assert set(FORMULAS) == set(DIVERGENCES)
    asked = {loss.divergence for loss in OWN if loss.fn}
    assert asked == set(DIVERGENCES)


def test_a_departure_by_design_is_told_from_a_failure():
    wrong = next(w.loss for w in WRONG if "museum 14" in w.provenance)
    stated = dataclasses.replace(wrong, by_design={"8": ("in the tail", "page 3")})
    (verdict,) = run(stated, "8")
    assert verdict.status == BY_DESIGN and verdict.note == "page 3"
    assert "mass that the student puts in the tail" in verdict.bug
    departures = [(loss.name, v.law) for loss in OWN for v in run(loss)
                  if v.status == BY_DESIGN]  # fmt: skip
    assert departures == [
        ("generalized_jsd, token_mean", "10"),
        ("top-k forward_kl, tail renormalize", "8"),
        ("top-k forward_kl, tail zero", "8"),
    ]


def test_a_stated_departure_excuses_no_other_bug():
    """A beta that is known to jump may still not have its ends swapped."""
    swapped = next(w.loss for w in WRONG if w.loss.name == "beta's ends swapped")
    jump = ("no knob of direction", "page 3")
    (verdict,) = run(dataclasses.replace(swapped, by_design={"10": jump}), "10")
    assert verdict.status == FAILED and "ends of beta are swapped" in verdict.bug


def test_what_cannot_be_asked_is_not_applicable_with_the_reason():
    loss = LossUnderTest("nothing", reasons={"3": "because"})
    verdicts = by_law(loss)
    assert {v.status for v in verdicts.values()} == {NOT_APPLICABLE}
    assert verdicts["3"].note == "because"
    assert all(v.note for v in verdicts.values())


def test_what_a_loss_does_not_take_is_not_asked_and_a_part_is_said_to_be_left_out():
    bare = {loss.name: by_law(loss) for loss in RIGHT}["without options"]
    asked = {law for law, v in bare.items() if v.status != NOT_APPLICABLE}
    assert asked == {"1", "2", "3", "4", "5", "6", "7", "12", "15", "i1"}
    notes = {law: v.note for law, v in bare.items() if v.note and law in asked}
    assert notes.keys() == {"5", "6", "15", "i1"}
    assert "left to the caller" in notes["5"] and "not asked" in notes["6"]
    assert "T = 1" in notes["i1"]
    full = {loss.name: by_law(loss) for loss in OWN}
    notes = {law for law, v in full["forward_kl, token_mean"].items() if v.note}
    assert notes == {"8", "9", "10", "13", "14", "15"}  # 15 by its other half
    assert full["forward_kl, sum"]["5"].note == ""
    assert "convention" in full["forward_kl, sequence_mean"]["4"].note
    assert full["fused forward_kl"]["13"].note == ""
    counts = {x.name: run(x, "5")[0].note for x in RIGHT if x.accumulate}
    assert set(counts.values()) == {""}


def test_a_loss_that_raises_has_failed_and_keeps_its_message():
    def broken(student, teacher, labels):
        raise RuntimeError("no\nway")

    verdict = run(LossUnderTest("broken", broken), "3")[0]
    assert verdict.status == FAILED
    assert verdict.bug == "raises RuntimeError: no"


def test_unknown_laws_are_refused():
    with pytest.raises(ArgumentError, match="law '16'"):
        run(LossUnderTest("x"), "16")
    with pytest.raises(ArgumentError, match="law '4a'"):
        run(LossUnderTest("x", reasons={"4a": "because"}))
    with pytest.raises(ArgumentError, match="law 'i4'"):
        run(LossUnderTest("x", by_design={"i4": ("", "page 3")}))


@pytest.mark.parametrize(
    "declared, named",
    [
        ({"divergence": "forwardkl"}, "forwardkl"),
        ({"params": {"beta": 0.5}}, "beta"),
        ({"reduction": "mean"}, "'mean'"),
        ({"options": frozenset(["temprature"])}, "temprature"),
        ({"fused_options": frozenset(["cap"])}, "'cap'"),
        ({"knob": ("beta", "forward_kl", "reversed")}, "reversed"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
    ],
)
def test_a_declaration_that_would_never_be_asked_is_refused(declared, named):
    with pytest.raises(ArgumentError, match=named):
        LossUnderTest("x", **declared)


PARAMS = {
    "forward_kl": [{}],
    "reverse_kl": [{}],
    "tvd": [{}],
    "cross_entropy": [{}],
    "kl_mix": [{"lam": x} for x in (0.0, 0.3, 1.0)],
    "generalized_jsd": [{"beta": x} for x in (0.0, 0.1, 0.5, 0.9, 1.0)],
    "skew_kl": [{"alpha": x} for x in (0.0, 0.1, 0.9)],
    "skew_reverse_kl": [{"alpha": x} for x in (0.0, 0.1, 0.9)],
    "adaptive_kl": [{"alpha": x} for x in (0.2, 0.5, 0.9)],
    "alpha_beta": [{"alpha": a, "beta": b} for a, b in ((0.3, 0.6), (1.0, 0.5))],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", PARAMS)
def test_no_divergence_of_kdlib_is_accused_whatever_its_settings(name, dtype):
    for params in PARAMS[name]:
        for reduction in REDUCTIONS:
            loss = objective_loss(name, reduction, params, dtype)
            verdicts = by_law(loss)
            bugs = [v.bug for v in verdicts.values() if v.status == FAILED]
            assert not bugs, (params, reduction)
            held = {law for law, v in verdicts.items() if v.status == PASSED}
            assert held >= {*"1234567", "11", "12", "15", "i1", "i2", "i3"}
        assert failed(top_k_loss("bucket", name, params, dtype)) == {}
        assert failed(fused_loss(name, params, dtype)) == {}


def test_every_divergence_has_settings_here():
    assert set(PARAMS) == set(DIVERGENCES)


# --- what is true ---------------------------------------------------------------------

A, B = (0.6, 0.3, 0.1), (0.2, 0.3, 0.5)  # of the teacher, of the student
LN = math.log
BY_HAND = {
    "forward_kl": ({}, 0.6 * LN(3) - 0.1 * LN(5)),
    "reverse_kl": ({}, -0.2 * LN(3) + 0.5 * LN(5)),
    "kl_mix": ({"lam": 0.25}, 0.4 * LN(3) + 0.05 * LN(5)),
    # the mixture is (.4, .3, .3)
    "generalized_jsd": (
        {"beta": 0.5},
        0.5 * (0.6 * LN(1.5) - 0.1 * LN(3) - 0.2 * LN(2) + 0.5 * LN(5 / 3)),
    ),
    # (.3, .3, .4) is a quarter of the teacher's and three of the student's
    "skew_kl": ({"alpha": 0.25}, 0.6 * LN(2) - 0.1 * LN(4)),
    "skew_reverse_kl": ({"alpha": 0.75}, -0.2 * LN(1.5) + 0.5 * LN(1.25)),
    # the head is the first token, with half of all differences
    "adaptive_kl": ({"alpha": 0.5}, 0.2 * LN(3) + 0.2 * LN(5)),
    "tvd": ({}, 0.4),
    # (p^3 + 2 q^3) / 3 - p q^2 is .16 / 3, 0 and .176 / 3
    "alpha_beta": ({"alpha": 1.0, "beta": 2.0}, 0.056),
    "cross_entropy": ({}, 0.6 * LN(5) + 0.3 * LN(10 / 3) + 0.1 * LN(2)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_each_formula_is_the_number_worked_by_hand(name):
    params, expected = BY_HAND[name]
    p, q = (torch.tensor([x], dtype=torch.float64) for x in (A, B))
    assert float(FORMULAS[name](p, q, **params)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "name, gradient",
    [
        ("forward_kl", lambda p, q: q - p),
        ("reverse_kl", lambda p, q: q * ((q / p).log() - (q * (q / p).log()).sum())),
        ("cross_entropy", lambda p, q: q - p),
    ],
)
def test_the_expected_gradient_of_i1_is_the_closed_form(name, gradient):
    loss, t = LossUnderTest("x", divergence=name, scale_by_t2=True), 2.0
    batch = make_batch(loss)
    measured = differentiate(lambda b: truth(loss, b, t), batch)[1]
    expected = torch.zeros_like(measured)
    for row, (start, stop) in enumerate(SPANS):
        for at in range(start - 1, stop - 1):
            p, q = (
                (x[row, at] / t).softmax(-1) for x in (batch.teacher, batch.student)
            )
            expected[row, at] = t * gradient(p, q) / 11
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-6), ("float32", 1e-4)])
def test_equal_is_equal_up_to_rounding(dtype, tolerance):
    loss = LossUnderTest("x", dtype=getattr(torch, dtype))
    assert frame.near(loss, 100 * (1 + 0.9 * tolerance), 100)
    assert not frame.near(loss, 100 * (1 + 1.1 * tolerance), 100)
    assert frame.near(loss, -0.009 * tolerance, 0.0)
    assert not frame.near(loss, -0.011 * tolerance, 0.0)
    three = torch.full((4,), 3.0).double()
    assert frame.same(loss, three * (1 + 0.9 * tolerance), three)
    assert not frame.same(loss, three * (1 - 1.1 * tolerance), three)
    nan = torch.tensor(math.nan)
    assert not frame.near(loss, math.nan, 1.0) and not frame.same(loss, nan, three)


def test_hand_computed_truth():
    """Two tokens in two rows, worked on paper: KL = ln 2 - 0 and 0.5 ln 0.5 + ..."""
    half, sure = [0.5, 0.5], [0.75, 0.25]
    logits = torch.tensor([[half, half], [sure, half]], dtype=torch.float64).log()
    teacher = torch.tensor([[sure, half], [half, half]], dtype=torch.float64).log()
    labels = torch.tensor([[-100, 1], [-100, 0]])
    loss = LossUnderTest("x")
    batch = make_batch(loss)._replace(student=logits, teacher=teacher, labels=labels)
    # KL((3/4, 1/4) || (1/2, 1/2)) and the other way round
    one, two = 0.1308120359, 0.1438410362
    assert float(truth(loss, batch)) == pytest.approx((one + two) / 2, abs=1e-9)
    total = dataclasses.replace(loss, reduction="sum", divergence="reverse_kl")
    assert float(truth(total, batch)) == pytest.approx(two + one, abs=1e-9)
    rows = dataclasses.replace(loss, reduction="sequence_mean")
    assert float(truth(rows, batch)) == pytest.approx((one + two) / 2, abs=1e-9)
    only = batch._replace(labels=torch.tensor([[-100, 1], [-100, -100]]))
    assert float(truth(loss, only)) == pytest.approx(one, abs=1e-9)


# --- peers ----------------------------------------------------------------------------


def test_a_peer_that_is_missing_is_skipped_with_the_reason(monkeypatch):
    for name in ("trl", "liger_kernel", "swift", "verl", "modelopt"):
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    monkeypatch.setattr(board.importlib.metadata, "version", lambda name: "7")
    rows = board.leaderboard()
    theirs = [row for row in rows if row.library != "kdlib"]
    assert {(row.library, row.version) for row in theirs} == {
        (x, "7") for x in peers.PEERS
    }
    assert all(row.skipped.startswith("ModuleNotFoundError") for row in theirs)
    text = board.render(rows)
    for library in peers.PEERS:
        assert f"{library} 7" in text
    assert text.count("skipped: ModuleNotFoundError") == len(peers.PEERS)

    def unknown(name):
        raise board.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(board.importlib.metadata, "version", unknown)
    (row,) = board.of("TRL")
    assert row.version == "not installed" and "pip install trl" in row.skipped


def committed(request) -> dict:
    path = request.config.rootpath / "notebooks/results/laws_peers.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize("library", peers.PEERS)
def test_a_peer_that_is_here_still_gets_the_committed_verdicts(library, request):
    rows = board.of(library)
    known = [row for row in committed(request)["rows"] if row["library"] == library]
    if rows[0].skipped or rows[0].version != known[0]["version"]:
        pytest.skip(f"{rows[0].version}: {rows[0].skipped or 'another version'}")
    now = {(row.loss, v.law): v.status for row in rows for v in row.verdicts}
    then = {
        (row["loss"], v["law"]): v["status"] for row in known for v in row["verdicts"]
    }
    assert now == then


def test_own_results_have_a_row_a_law_and_turn_into_json():
    rows = board.own()
    text = board.render_laws(rows)
    for number, law in LAWS.items():
        assert any(
            line.split()[:1] == [number] and law.title in line
            for line in text.splitlines()
        )
    assert "failed" not in text and board.broken(rows) == 0
    data = json.loads(json.dumps(board.as_json(rows)))
    assert len(data) == len(OWN)
    statuses = {v["status"] for row in data for v in row["verdicts"]}
    assert statuses == {PASSED, BY_DESIGN, NOT_APPLICABLE}


def test_a_broken_loss_is_shown_with_its_bug():
    wrong = WRONG[0].loss
    rows = [board.Row("kdlib", "1", wrong.name, run(wrong))]
    assert board.broken(rows) > 0
    assert "probabilities in the place of log-probabilities" in board.render_laws(rows)
    assert "probabilities in the place of log-probabilities" in board.render(rows)


def test_departures_by_design_and_credit_are_shown():
    jsd = next(x for x in OWN if x.name == "generalized_jsd, token_mean")
    text = board.render([board.Row("TRL", "1", jsd.name, run(jsd))])
    assert "law 10 by design: beta is no knob of direction" in text
    assert "divergences.py: the interior goes to 0" in text and "broken:" not in text
    assert all(f"right: {line}" in text for line in peers.CREDIT["TRL"])


def test_committed_leaderboard_is_whole(request):
    """Every broken verdict against a peer has a check by hand: the line of its source,
    and a number that is not the right one."""
    result = committed(request)
    for key in ("command", "device", "date", "versions", "rows", "checked", "credit"):
        assert result[key], key
    assert set(result["versions"]) >= set(peers.PEERS.values()) | {"torch"}
    for row in result["rows"]:
        assert {v["law"] for v in row["verdicts"]} == set(LAWS)
        for verdict in row["verdicts"]:
            if verdict["status"] == FAILED:
                assert row["library"] != "kdlib"
                assert verdict["bug"] and verdict["measured"]
                checks = [
                    check
                    for check in result["checked"][row["library"]]
                    if verdict["law"] in check["laws"]
                ]
                assert checks, (row["loss"], verdict["law"])
            if verdict["status"] == BY_DESIGN:
                assert re.search(r"\w+\.py", verdict["note"])
    for checks in result["checked"].values():
        for check in checks:
            assert re.search(r"\.py:\d+", check["source"]) and check["case"]
            assert any(x["library"] != x["right"] for x in check["numbers"])


def test_credit_is_printed_for_every_library(request):
    text = "\n".join(committed(request)["table"])
    for library, credit in peers.CREDIT.items():
        assert credit and library in text
        assert all(f"right: {line}" in text for line in credit)
