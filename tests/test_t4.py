"""Colab's free card, a T4, by what it answers: nothing of kdlib computes in bf16 there.

A T4 has compute capability 7.5. torch.cuda.is_bf16_supported() is True for it all the
same, because bf16 is emulated, at a fraction of the speed of fp16. The card's answers
are put in at torch.cuda; no tensor is moved to it.
"""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdlib import bench, build_cache, evaluate_command, models, train_command
from kdlib.errors import ArgumentError
from kdlib.metrics import peak_flops
from kdlib.precision import Precision
from kdlib.run_plan import Plan
from kdlib.training_rows import PRESETS

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")
NEWER = {"T4": (7, 5), "A100": (8, 0)}
HALF = {"T4": torch.float16, "A100": torch.bfloat16}


class Asked(Exception):
    """The dtype is known, and nothing need be loaded or measured."""


def put_in(monkeypatch, card):
    answers = {
        "is_available": True,
        "is_bf16_supported": True,  # both say so
        "get_device_capability": NEWER[card],
        "get_device_name": f"Tesla {card}",
        "current_device": 0,
        "device_count": 1,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, answer=answer, **k: answer)


@pytest.fixture(params=list(NEWER))
def card(request, monkeypatch):
    """A T4, and an A100, without which a test could not tell a rule from a constant."""
    put_in(monkeypatch, request.param)
    return request.param


def test_autocast_and_scaler(card):
    chosen = Precision.choose("auto", CUDA)
    assert chosen.autocast().fast_dtype == HALF[card]
    assert chosen.scaler().is_enabled() == (card == "T4")


def test_the_commands_load_the_teacher_in_the_card_s_own_format(
    card, monkeypatch, tmp_path
):
    asked = []

    def load(name, *, dtype=torch.float32):
        if name == "student":  # in float32, everywhere
            return None, None
        asked.append(dtype)
        raise Asked

    monkeypatch.setattr(models, "load", load)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"user_input": "a", "response": "b"}) + "\n")
    ranks = SimpleNamespace(device=CUDA, rank=0, world=1, shard=False)
    toml = tmp_path / "run.toml"
    toml.write_text(
        "[train]\nsteps = 1\nbatch_size = 1\n[objective]\n"
        f'[data]\nsource = "{data.name}"\n[teacher]\nmodel = "teacher"\n'
        "[student]\nbuild = { hidden_size = 16, layers = 1, heads = 2 }\n"
    )
    commands = {
        "train": lambda: train_command.prepare(Plan.read(toml), ranks),
        "cache": lambda: build_cache.build("teacher", data, tmp_path / "out"),
        "evaluate": lambda: evaluate_command.run("student", data, teacher="teacher"),
    }
    for name, command in commands.items():
        asked.clear()
        with pytest.raises(Asked):
            command()
        assert asked == [HALF[card]], name


def test_the_benchmarks_measure_what_the_card_computes(card, monkeypatch):
    def measure(method, divergence, size, *rest):
        raise Asked(size)

    monkeypatch.setattr(bench, "_measure", measure)
    with pytest.raises(Asked) as asked:
        bench.bench_loss("cuda")
    (size,) = asked.value.args
    assert size.dtype == str(HALF[card]).removeprefix("torch.")
    assert (size == bench.SIZES["cuda"]) == (card == "A100")
    assert replace(size, dtype="bfloat16") == bench.SIZES["cuda"]
    for preset in PRESETS.values():  # of `bench train`; one that asks for bf16 raises
        assert Precision.choose(preset.precision, CUDA).name in (
            ("fp16", "fp32") if card == "T4" else ("bf16", "fp32")
        )


def test_bf16_that_is_asked_for_is_refused_with_the_way_out(monkeypatch):
    put_in(monkeypatch, "T4")
    with pytest.raises(ArgumentError, match=r"(?s)Tesla T4.*'fp16' or 'auto'"):
        Precision.choose("bf16", CUDA)


def test_a_t4_s_mfu_is_a_share_of_what_it_does_in_fp16(monkeypatch):
    put_in(monkeypatch, "T4")
    name = Precision.choose("auto", CUDA).name
    assert peak_flops(CUDA, name) == 65e12


def asks_torch(source):
    """The lines that ask torch about bf16: it says yes where it emulates."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr == "is_bf16_supported"
    ]


def test_nothing_asks_torch_whether_bf16_is_supported():
    assert asks_torch("x = 1\nhalf = torch.cuda.is_bf16_supported()\n") == [2]
    for folder in ("kdlib", "notebooks", "exercises"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not asks_torch(path.read_text(encoding="utf-8")), path
