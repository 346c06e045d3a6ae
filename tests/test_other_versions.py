"""`make colab` and `make outdated`: what they read and say. They need the network."""

from __future__ import annotations

import sys
from pathlib import Path

import other_versions as other
import pytest

ROOT = Path(__file__).parents[1]


def test_names_leave_comments_out():
    text = "# a comment\ntorch>=2.10  # and why\n\n-r other.txt\nPy_YAML==6.0\n"
    assert other.names(text) == ["torch>=2.10", "Py_YAML==6.0"]
    assert other.versions(other.names(text)) == {"py-yaml": "6.0"}


def test_colab_s_file_is_a_version_for_every_name():
    lines = other.names(other.COLAB.read_text())
    assert len(other.versions(lines)) == len(lines) > 10


def test_only_what_differs_is_shown_and_what_is_asked_for_comes_first():
    old = {"zlib": "1.0", "attrs": "1.0", "same": "2.0"}
    new = {"zlib": "1.1", "attrs": "2.0", "same": "2.0", "only-there": "1.0"}
    rows = other.differences(old, new, {"zlib"}).splitlines()[1:-1]
    assert [row.split()[0] for row in rows] == ["zlib", "attrs"]
    assert rows[0].split() == ["zlib", "*", "1.0", "1.1"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [True, False])
def test_what_broke_is_counted_by_file_and_reason(tmp_path, capsys, broken):
    test = tmp_path / "test_some.py"
    test.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        f"def test_it(i):\n    assert not ({broken} and i), 'changed'\n"
    )
    status = other.suite(Path(sys.executable), [str(test)])
    said = capsys.readouterr().out
    assert status == int(broken)
    if broken:
        assert "2 tests broke." in said and "AssertionError: changed" in said
    else:
        assert "Nothing broke." in said
