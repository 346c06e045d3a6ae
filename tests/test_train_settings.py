"""TrainConfig from TOML and YAML. What is refused: tests/faults/test_bad_input.py."""

from __future__ import annotations

from dataclasses import fields

import pytest

from kdlib.settings import MAY_CHANGE, TrainConfig

TOML = """
steps = 100
learning_rate = 3e-4
micro_batch_size = 8  # a comment
precision = "bf16"
fused = true
"""
YAML = """
steps: 100
learning_rate: 3e-4   # a text, to YAML
micro_batch_size: 8
precision: bf16
fused: true
"""
WANTED = TrainConfig(
    steps=100, learning_rate=3e-4, micro_batch_size=8, precision="bf16", fused=True
)


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML)]
)
def test_both_kinds_of_file_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert TrainConfig.read(tmp_path / name) == WANTED


def test_a_whole_number_will_do_for_a_fraction(tmp_path):
    (tmp_path / "a.toml").write_text("steps = 2\nlearning_rate = 1\nwarmup = 0\n")
    config = TrainConfig.read(tmp_path / "a.toml")
    assert config.learning_rate == 1 and config.warmup == 0


def test_null_is_none(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 2\nmicro_batch_size: null\n")
    assert TrainConfig.read(tmp_path / "a.yaml") == TrainConfig(steps=2)


def test_what_may_change_is_a_setting_each():
    names = {field.name for field in fields(TrainConfig)}
    assert set(MAY_CHANGE) < names
    # These decide what is learnt.
    assert not {"steps", "batch_size", "learning_rate", "seed"} & set(MAY_CHANGE)
