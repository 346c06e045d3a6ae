"""A model as an ONNX file, and that file as a model.

    export(model, path)    the graph of one forward pass, any batch and any length
    OnnxModel(path)        the file under ONNX Runtime on one core; reads like a model

The graph has no cache: each pass reads the whole prefix. It needs the packages onnx,
onnxscript and onnxruntime, which the notebooks' requirements bring.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

from kdlib.errors import ModelError

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"


class Logits(torch.nn.Module):
    """The logits alone, from two tensors: what a phone calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def export(model, path: str | Path) -> Path:
    """Write the model as one ONNX file; the model itself is put into eval mode.

    Both axes are named dynamic. The example has sizes of its own, 2 and 7, because an
    axis of size 1 would be recorded as a constant.

    Raises ModelError where a package is missing.
    """
    _need("onnx"), _need("onnxscript")
    path = Path(path)
    ids = torch.arange(14).reshape(2, 7) % model.config.vocab_size
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        # Of packages that are not there, and of names inside torch.export.
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                Logits(model.eval()),
                (ids, torch.ones_like(ids)),
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                dynamic_shapes={name: axes for name in INPUTS},
                dynamo=True,
                verbose=False,
            )
        finally:
            logging.disable(logging.NOTSET)
    graph = program.model_proto
    # The exporter notes for every node which line of Python it came from: a third of
    # the file of a small model, and of no use on a phone.
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    path.write_bytes(graph.SerializeToString())
    return path


class OnnxModel(torch.nn.Module):
    """An ONNX file that kdlib's rooms can ask like a causal LM (evaluate, say).

    Raises ModelError where onnxruntime is missing or cannot read the file.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        runtime = _need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        try:
            self.session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has exceptions of its own
            raise ModelError(
                f"ONNX Runtime cannot load {path}: {error}", "export the model again"
            ) from error
        # Says on which device this model is.
        self.here = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, input_ids, attention_mask=None, **_):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        given = (input_ids, attention_mask.long())
        fed = {n: t.numpy() for n, t in zip(INPUTS, given, strict=True)}
        (logits,) = self.session.run([OUTPUT], fed)
        return SimpleNamespace(logits=torch.from_numpy(logits))


def _need(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"this needs the package {name}, which is not installed",
            "pip install onnx onnxscript onnxruntime",
        ) from error
