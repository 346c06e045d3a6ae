"""The remote teacher against a real server process that serves the shipped teacher."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch

from kdlib import build_cache, json_server, localize, models
from kdlib.errors import ArgumentError, ModelError
from kdlib.json_server import JsonServer
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.sparse_targets import top_k_targets
from kdlib.teachers import CachedTeacher, LiveTeacher, RemoteTeacher, write_cache

SERVER = Path(__file__).with_name("logprob_server.py")


@pytest.fixture(scope="module")
def shipped():
    # In float64, as on the server: no rounding decides which token comes before which.
    return models.load("teacher", dtype=torch.float64)


@pytest.fixture(scope="module")
def address():
    process = subprocess.Popen(
        [sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(json_server, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def batch(shipped):
    """Rows of different length, letters of two tokens, and a teacher that errs."""
    examples = localize.examples("test", limit=200)[::397] + localize.examples(
        "test", locales=["pl"], formats=["long"], kinds=["language"], limit=2
    )
    examples += localize.examples("test", context="nothing", limit=1)[2:3]
    collator = PairCollator(shipped[1], teacher_max_length=256, student_max_length=256)
    made = collator(examples)
    assert len({int(n) for n in made.teacher.attention_mask.sum(1)}) > 2
    return made


def served(address, shipped, fault="good", **options):
    options = {"model": "teacher", "retries": 2, **options}
    return RemoteTeacher(f"{address}/{fault}", shipped[1], **options)


def told(address, fault, what):
    with urllib.request.urlopen(f"{address}/{fault}/{what}") as answer:
        return json.loads(answer.read())


# --- What a sound server gives ---


@pytest.mark.parametrize(
    ("k", "tail"), [(1, "bucket"), (8, "bucket"), (8, "zero"), (20, "renormalize")]
)
def test_targets_are_the_live_teachers(address, shipped, batch, k, tail):
    live = top_k_targets(LiveTeacher(shipped[0]).targets(batch), k, tail)
    remote = served(address, shipped, k=k, tail=tail).targets(batch)
    assert remote.indices.shape == (len(batch.response_ids), k)
    torch.testing.assert_close(
        remote.log_probs.double(), live.log_probs, rtol=0, atol=1e-6
    )
    assert torch.equal(remote.indices, live.indices)
    assert (remote.tail, remote.temperature, remote.weights) == (tail, 1.0, None)


def test_the_actual_token_is_not_kept_where_it_is_not_among_the_k(
    address, shipped, batch
):
    likeliest = LiveTeacher(shipped[0]).targets(batch).argmax(-1)
    assert (likeliest != batch.response_ids).any()  # or the next line shows nothing
    remote = served(address, shipped, k=1).targets(batch)
    assert torch.equal(remote.indices[:, 0], likeliest)


def test_a_loss_from_the_server_is_the_live_teachers(address, shipped, batch):
    vocabulary = len(shipped[1])
    student = torch.randn(len(batch.response_ids), vocabulary).double()
    live = top_k_targets(LiveTeacher(shipped[0]).targets(batch), 8)
    remote = served(address, shipped).targets(batch)
    losses = [
        Objective()(student, t, batch.response_ids, row_ids=batch.row_ids).total
        for t in (live, remote)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_what_is_asked_of_the_server(address, shipped, batch):
    served(address, shipped, "asked", k=5, api_key="sesame", workers=1).targets(batch)
    last = told(address, "asked", "last")
    row = batch.teacher.input_ids[-1][batch.teacher.attention_mask[-1]]
    assert last["prompt"] == row.tolist()
    assert (last["model"], last["key"]) == ("teacher", "Bearer sesame")
    assert (last["prompt_logprobs"], last["max_tokens"]) == (5, 1)
    # The model's generation_config.json must not choose for us.
    neutral = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0}
    neutral["repetition_penalty"] = 1
    assert neutral.items() <= last.items()
    assert told(address, "asked", "count")["count"] == len(batch.example_ids)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1_and_one_model_needs_no_name(
    address, shipped, batch, suffix
):
    teacher = RemoteTeacher(f"{address}/good{suffix}", shipped[1])
    assert teacher.model == "teacher"
    assert len(teacher.targets(batch)) == len(batch.response_ids)


def test_rows_stay_in_order_whichever_answer_comes_first(address, shipped, batch):
    late = served(address, shipped, "late").targets(batch)
    assert torch.equal(late.indices, served(address, shipped).targets(batch).indices)


@pytest.mark.parametrize("spelling", ["pieces", "half-characters"])
def test_other_versions_spell_tokens_otherwise(address, shipped, batch, spelling):
    assert "\ufffd" in "".join(shipped[1].decode([t]) for t in batch.response_ids)
    remote = served(address, shipped, spelling).targets(batch)
    assert torch.equal(remote.indices, served(address, shipped).targets(batch).indices)


def test_another_temperature_is_refused(address, shipped, batch):
    targets = served(address, shipped).targets(batch)
    student = torch.zeros(len(batch.response_ids), len(shipped[1]))
    with pytest.raises(ArgumentError, match="temperature = 2.0"):
        Objective(temperature=2.0)(
            student, targets, batch.response_ids, row_ids=batch.row_ids
        )


def test_a_cache_of_the_servers_targets(address, shipped, batch, tmp_path):
    teacher, path = served(address, shipped), tmp_path / "t.safetensors"
    write_cache(path, teacher, [batch], shipped[1], k=8)
    cached = CachedTeacher(path, shipped[1], teacher=teacher)
    assert cached.facts["teacher"] == "served as teacher"
    targets, remote = cached.targets(batch), teacher.targets(batch)
    assert torch.equal(targets.indices.long(), remote.indices)
    assert torch.equal(targets.log_probs, remote.log_probs.half())
    for options in ({"k": 4}, {"tail": "zero"}, {"temperature": 2.0}):
        with pytest.raises(ArgumentError, match="the teacher gives"):
            write_cache(tmp_path / "u", teacher, [batch], shipped[1], **options)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_the_command_asks_a_server(address, shipped, tmp_path):
    rows = [vars(e) for e in localize.examples("test", locales=["it"], limit=2)]
    manifest = build_cache.build(
        f"{address}/command",
        rows,
        tmp_path / "c",
        tokenizer="teacher",
        server={"api_key": "sesame"},
        k=3,
        say=lambda line: None,
    )
    assert (manifest["plan"]["teacher"], manifest["plan"]["k"]) == (
        "served as teacher",
        3,
    )
    assert told(address, "command", "last")["key"] == "Bearer sesame"
    assert len(CachedTeacher(tmp_path / "c", shipped[1])) == len(rows)
    with pytest.raises(ModelError, match="no-such-folder' cannot be loaded"):
        missing = str(tmp_path / "no-such-folder")
        build_cache.build(address, rows, tmp_path / "d", tokenizer=missing)
    assert not (tmp_path / "d").exists()


# --- What goes wrong ---

ASKED_AGAIN = ["shaky", "busy", "drop-once", "cut-once"]


@pytest.mark.parametrize("fault", ASKED_AGAIN)
def test_what_may_pass_is_asked_again(address, shipped, batch, fault):
    teacher = served(address, shipped, fault, workers=1)
    wanted = served(address, shipped).targets(batch)
    assert torch.equal(teacher.targets(batch).indices, wanted.indices)
    failures = {"shaky": 2}.get(fault, 1)
    count = told(address, fault, "count")["count"]
    assert count == len(batch.example_ids) + failures


WRONG = {
    "html": "no JSON but text/html: <html>Welcome",
    "drop": "failed 3 times, at last with RemoteDisconnected",
    "cut": "failed 3 times, at last with IncompleteRead",
    "down": "failed 3 times, at last with HTTP 500: engine died",
    "key": "HTTP 401",
    "null": "no prompt_logprobs",
    "no-choices": "no prompt_logprobs",
    "short": r"positions came back for \d+ tokens",
    "long": r"positions came back for \d+ tokens",
    "shifted": r"position \d+ lacks token \d+, which was sent",
    "holes": r"position \d+ cannot be read: None",
    "no-rank": r"position \d+ cannot be read",
    "few": "not k=8",
    "raw-logits": "probabilities of position",
    "nan": "probabilities of position",
    "other-tokenizer": "has another tokenizer: token",
    "unknown-token": "token 1000000 is 'x' there and nothing here",
    "no-spelling": "no decoded_token",
}
ONCE = set(WRONG) - {"drop", "cut", "down"}


@pytest.mark.parametrize("fault", WRONG)
def test_a_server_that_is_wrong_is_named(address, shipped, batch, fault):
    with pytest.raises(ModelError, match=WRONG[fault]) as caught:
        served(address, shipped, fault, workers=1).targets(batch)
    assert f"{address}/{fault}" in caught.value.what and caught.value.remedy
    # A refusal or a wrong answer stays one: it is not asked for again.
    assert told(address, fault, "count")["count"] == (1 if fault in ONCE else 3)


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_server_that_is_too_slow_is_given_up(address, shipped, batch, fault):
    # /trickle answers in full after two seconds, a byte at a time.
    with pytest.raises(ModelError, match="did not answer within timeout=1.0 s"):
        served(address, shipped, fault, timeout=1.0, workers=1).targets(batch)
    assert told(address, fault, "count")["count"] == 1


def test_the_servers_own_words_are_passed_on(address, shipped, batch):
    with pytest.raises(ModelError, match="HTTP 400: .*greater than max allowed: 20"):
        served(address, shipped, k=21).targets(batch)
    with pytest.raises(ModelError, match="HTTP 404") as caught:
        RemoteTeacher(f"{address}/good/v2", shipped[1], model="teacher").targets(batch)
    assert "check the url" in caught.value.remedy


def test_a_server_that_does_not_run(shipped, batch):
    with pytest.raises(ModelError, match="ConnectionRefusedError"):
        RemoteTeacher("http://127.0.0.1:9", shipped[1], retries=1).targets(batch)


def test_one_wrong_row_ends_the_work_of_the_others(address, shipped, batch):
    """The rows that wait for a retry do not wait to the end."""
    with pytest.raises(ModelError):
        served(address, shipped, "down", retries=0, workers=8).targets(batch)
    stop, server = threading.Event(), JsonServer(address, timeout=5, retries=30)
    stop.set()
    with pytest.raises(ModelError, match="failed 1 times"):
        server.ask("/down/v1/completions", {"prompt": [1]}, stop)


def test_waits_double(address):
    class Clock:
        waits = []

        def wait(self, seconds):
            self.waits.append(seconds)

    server = JsonServer(address, timeout=5, retries=4)
    with pytest.raises(ModelError, match="failed 5 times"):
        server.ask("/down/v1/completions", {"prompt": [1]}, Clock())
    assert Clock.waits == [0.01, 0.02, 0.04, 0.08]


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [("many-models", ArgumentError, "2 models"), ("odd-models", ModelError, "models")],
)
def test_the_models_name_must_be_clear(address, shipped, batch, fault, error, match):
    with pytest.raises(error, match=match):
        RemoteTeacher(f"{address}/{fault}", shipped[1]).targets(batch)


BAD_OPTIONS = [
    {"url": "localhost:8000"},
    {"url": "ftp://localhost"},
    {"url": "http://"},
    {"url": "http://localhost:none"},
    {"k": 0},
    {"tail": "sampled"},
    {"workers": 0},
    {"timeout": 0.0},
    {"timeout": float("nan")},
    {"retries": -1},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused(shipped, options):
    (name,) = options
    options = {"url": "http://localhost:1", **options}
    with pytest.raises(ArgumentError, match=name) as caught:
        RemoteTeacher(options.pop("url"), shipped[1], **options)
    assert caught.value.remedy
