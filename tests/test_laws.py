"""The laws against losses that are known to be wrong, and known to be right."""

import dataclasses
import json

import pytest
import torch
from wrong_losses import CEU, RIGHT, WRONG

from kdlib import leaderboard as board
from kdlib import peers
from kdlib.divergences import DIVERGENCES
from kdlib.errors import ArgumentError
from kdlib.laws import FAILED, LAWS, NOT_APPLICABLE, PASSED, run
from kdlib.loss_under_test import FORMULAS, LossUnderTest, make_batch, truth
from kdlib.own_losses import kdlib_losses

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


def test_a_documented_departure_is_told_from_a_failure():
    wrong = next(w.loss for w in WRONG if "museum 14" in w.provenance)
    documented = dataclasses.replace(wrong, documented={"8": "page 3"})
    (verdict,) = run(documented, "8")
    assert verdict.status == NOT_APPLICABLE and verdict.bug is None
    assert "documented: page 3" in verdict.note and "tail" in verdict.note
    documented = {v.law for loss in OWN for v in run(loss) if "documented" in v.note}
    assert documented == {"8", "10"}  # kdlib's own: two tails, one beta


def test_what_cannot_be_asked_is_not_applicable_with_the_reason():
    loss = LossUnderTest("nothing", reasons={"3": "because"})
    verdicts = by_law(loss)
    assert {v.status for v in verdicts.values()} == {NOT_APPLICABLE}
    assert verdicts["3"].note == "because"
    assert all(v.note for v in verdicts.values())


def test_a_loss_that_raises_has_failed_and_keeps_its_message():
    def broken(student, teacher, labels):
        raise RuntimeError("no\nway")

    verdict = run(LossUnderTest("broken", broken), "3")[0]
    assert verdict.status == FAILED
    assert verdict.bug == "raises RuntimeError: no"


def test_unknown_laws_and_divergences_are_refused():
    with pytest.raises(ArgumentError, match="law '16'"):
        run(LossUnderTest("x"), "16")
    with pytest.raises(ArgumentError, match="forwardkl"):
        run(LossUnderTest("x", divergence="forwardkl"))


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
    only = batch._replace(labels=torch.tensor([[-100, 1], [-100, -100]]))
    assert float(truth(loss, only)) == pytest.approx(one, abs=1e-9)


# --- peers ----------------------------------------------------------------------------


def test_a_peer_that_is_missing_is_skipped_with_the_reason(monkeypatch):
    def missing(name):
        raise ImportError(f"cannot import {name}")

    monkeypatch.setattr(peers, "import_module", missing)
    monkeypatch.setattr(board.importlib.metadata, "version", lambda name: "7")
    rows = board.leaderboard()
    theirs = [row for row in rows if row.library != "kdlib"]
    assert {(row.library, row.version) for row in theirs} == {
        (x, "7") for x in peers.PEERS
    }
    assert all(row.skipped.startswith("ImportError: cannot import") for row in theirs)
    text = board.render(rows)
    for library in peers.PEERS:
        assert f"{library} 7" in text
    assert text.count("skipped: ImportError") == len(peers.PEERS)

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
    for law, (title, _) in LAWS.items():
        assert any(
            line.split()[:1] == [law] and title in line for line in text.splitlines()
        )
    assert "failed" not in text and board.broken(rows) == 0
    data = json.loads(json.dumps(board.as_json(rows)))
    assert len(data) == len(OWN)
    statuses = {v["status"] for row in data for v in row["verdicts"]}
    assert statuses == {PASSED, NOT_APPLICABLE}


def test_a_broken_loss_is_shown_with_its_bug():
    wrong = WRONG[0].loss
    rows = [board.Row("kdlib", "1", wrong.name, run(wrong))]
    assert board.broken(rows) > 0
    assert "probabilities in the place of log-probabilities" in board.render_laws(rows)
    assert "probabilities in the place of log-probabilities" in board.render(rows)


def test_committed_leaderboard_is_whole(request):
    """Every failed verdict against a peer names the line of its source and a number."""
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
                key = f"{row['library']}, {row['loss']}, law {verdict['law']}"
                assert result["checked"][key], key
