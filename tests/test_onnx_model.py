"""The exported file is the same function: on the test split, and at other shapes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdlib import models, onnx_model, phone
from kdlib.errors import ModelError
from kdlib.evaluate import evaluate, response_logits
from kdlib.onnx_model import OnnxModel, export

STUDENT = Path(__file__).parents[1] / "notebooks/results/phone_student.safetensors"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
missing = [name for name in PACKAGES if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


@pytest.fixture(scope="module")
def data():
    models.quiet_transformers()
    return phone.Data()


@pytest.fixture(scope="module")
def student(data):
    model = models.build(data.tokenizer, **phone.STUDENT).eval()
    found = model.load_state_dict(load_file(STUDENT), strict=False)
    assert found.missing_keys in ([], ["lm_head.weight"])  # tied: it has one name
    return model


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    return export(student, tmp_path_factory.mktemp("onnx") / "student.onnx")


def far_apart(ours, theirs, batches, side) -> float:
    """The largest difference of a logit, over every response token."""
    with torch.no_grad():
        return max(
            (response_logits(ours, b, side) - response_logits(theirs, b, side))
            .abs()
            .max()
            .item()
            for b in batches
        )


@needs_onnx
@pytest.mark.slow
def test_the_exported_student_is_the_student_on_the_test_split(data, student, exported):
    test, same = data.batches(data.test), OnnxModel(exported)
    assert sum(len(b.example_ids) for b in test) == 1000
    assert far_apart(student, same, test, "student") < 1e-4
    ours, theirs = (evaluate(m, test, [None] * len(test)) for m in (student, same))
    assert ours.hits == theirs.hits


@needs_onnx
@pytest.mark.slow
def test_the_exported_teacher_is_the_teacher_on_the_test_split(data, tmp_path):
    test = data.batches(data.test)
    same = OnnxModel(export(data.teacher, tmp_path / "teacher.onnx"))
    assert far_apart(data.teacher, same, test, "teacher") < 1e-4


@needs_onnx
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 1), (3, 40), (1, 128)])
def test_shapes_that_the_example_did_not_have(student, exported, shape):
    ids = torch.randint(5, 900, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = student(ids).logits, OnnxModel(exported)(ids).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@needs_onnx
def test_padding_is_not_read(student, exported):
    """Row 2 is row 1 with four padded places, whatever stands in them."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 900, (1, 6), generator=rng)
    rest = torch.randint(5, 900, (2, 4), generator=rng)
    padded = torch.cat([ids.expand(2, -1), rest], 1)
    mask = torch.ones_like(padded).bool()
    mask[:, 6:] = False
    same = OnnxModel(exported)
    found = same(padded, mask).logits[:, :6]
    alone = same(ids).logits.expand(2, -1, -1)
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)
    left = torch.cat([rest, ids.expand(2, -1)], 1)
    with torch.no_grad():
        ours = student(left, mask.flip(1)).logits[:, 4:]
    theirs = same(left, mask.flip(1)).logits[:, 4:]
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@needs_onnx
def test_a_tied_matrix_is_in_the_file_once_and_python_s_lines_are_not(
    student, exported
):
    import onnx

    graph = onnx.load(exported).graph
    numbers = sum(len(tensor.raw_data) for tensor in graph.initializer)
    weights = 4 * sum(p.numel() for p in student.parameters())
    assert weights <= numbers < 1.05 * weights
    assert exported.stat().st_size < 1.15 * weights
    assert not any(node.metadata_props for node in graph.node)


@needs_onnx
def test_a_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "none.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ModelError, match="none.onnx(.|\n)*export the model again"):
        OnnxModel(path)


@pytest.mark.parametrize("absent", PACKAGES)
def test_a_missing_package_is_named_with_its_remedy(student, absent, monkeypatch):
    def without(name, *rest):
        if name == absent:
            raise ModuleNotFoundError(name)
        return object()

    monkeypatch.setattr(onnx_model.importlib, "import_module", without)
    ask = OnnxModel if absent == "onnxruntime" else lambda path: export(student, path)
    with pytest.raises(ModelError, match=f"package {absent}(.|\n)*pip install"):
        ask("nowhere.onnx")


def test_the_tests_requirements_install_what_is_needed_here():
    """Or the tests above would be skipped in silence."""
    wanted = (Path(__file__).parents[1] / "requirements.txt").read_text()
    assert all(f"\n{name}>=" in wanted for name in (*PACKAGES, "torchao"))
