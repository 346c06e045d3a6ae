"""One request on one core: latency, memory, file and quality of what may ship.

    OMP_NUM_THREADS=1 python notebooks/experiments/phone_latency.py [--rounds 15]

Writes notebooks/results/phone_latency.json. The student is that of chapter 13
(results/phone_student.safetensors); the teacher is the shipped one. Each is run

    torch                    as transformers runs it, float32
    torchao int8 weights     Int8WeightOnlyConfig, head and linear layers
    torchao int8 dynamic     Int8DynamicActivationInt8WeightConfig, the same layers
    ONNX Runtime             the exported graph, float32
    ONNX Runtime int8        the same, by onnxruntime.quantization.quantize_dynamic

    pass        one forward pass over prompt and answer of one request, batch 1. All
                variants take turns within a round, with the same requests; ratios are
                taken round by round. Median over rounds, and an interval of the median
                from the rounds in order (binomial, 95 % at least)
    draft       a pass of the student over a pass of the teacher, and what speculative
                decoding then makes of the measured acceptance: see chapter 13
    file        bytes of the file that holds the weights
    memory      peak of a process that loads the variant and answers, and the part of
                it that its packages took before (Linux: VmHWM)
    exact, kl   of kdlib.evaluate on the test split, through that very variant
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from math import comb
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from kdlib import models, phone
from kdlib.evaluate import evaluate, teacher_reference
from kdlib.ledger import command_of, provenance, write_json
from kdlib.onnx_model import OnnxModel, export
from kdlib.teachers import LiveTeacher

RESULTS = Path(__file__).parents[1] / "results"
STUDENT = RESULTS / "phone_student.safetensors"
MODELS = ("teacher", "student")
WAYS = (
    "torch",
    "torchao int8 weights",
    "torchao int8 dynamic",
    "ONNX Runtime",
    "ONNX Runtime int8",
)
REQUESTS = 20
SIDE = {"teacher": "teacher", "student": "student"}


def load(name: str, student: Path = STUDENT):
    teacher, tokenizer = models.load("teacher")
    if name == "teacher":
        return teacher
    model = models.build(tokenizer, **phone.STUDENT).eval()
    found = model.load_state_dict(load_file(student), strict=False)
    assert found.missing_keys in ([], ["lm_head.weight"]), found  # tied
    return model


def quiet_torchao():
    """torchao says at import which GPU extensions it lacks."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.quantization as ao
    finally:
        logging.disable(logging.NOTSET)
    return ao


def prepared(name: str, way: str, folder: Path, student: Path = STUDENT):
    """The variant, and the bytes of its weights' file."""
    model = load(name, student)
    if way == "torch":
        return model, len(save({n: p.detach() for n, p in model.named_parameters()}))
    if way.startswith("torchao"):
        ao = quiet_torchao()
        dynamic = way.endswith("dynamic")
        config = (
            ao.Int8DynamicActivationInt8WeightConfig()
            if dynamic
            else ao.Int8WeightOnlyConfig()
        )
        model = copy.deepcopy(model)
        ao.quantize_(model, config)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return model, file.tell()
    path = folder / f"{name}.onnx"
    if not path.exists():
        export(model, path)
    if way.endswith("int8"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

        small = folder / f"{name}-int8.onnx"
        if not small.exists():
            logging.disable(logging.WARNING)
            quantize_dynamic(path, small, weight_type=QuantType.QInt8)
            logging.disable(logging.NOTSET)
        path = small
    return OnnxModel(path), path.stat().st_size


def requests(data, side: str) -> list[torch.Tensor]:
    return [
        torch.tensor([getattr(p, f"{side}_prompt_ids") + p.response_ids])
        for p in data.test[:: len(data.test) // REQUESTS][:REQUESTS]
    ]


@torch.no_grad()
def one_round(variants: dict, asked: dict) -> dict[str, float]:
    """Milliseconds a request of every variant, one after the other."""
    found = {}
    for key, model in variants.items():
        given = asked[key.split(", ")[0]]
        start = time.perf_counter()
        for ids in given:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        found[key] = 1000 * (time.perf_counter() - start) / len(given)
    return found


def median_interval(values: list[float]) -> dict[str, float]:
    """The median between two values in order, which hold the true one in 95 % at least.

    They miss it where k values or fewer of n lie on one side of it: 2 P(B(n, 1/2) <= k)
    (below six values that is more than 5 %, and the interval is their whole range).
    """
    n, ordered, left, tail = len(values), sorted(values), 0, 0.0
    for k in range(n // 2):
        tail += comb(n, k) / 2**n
        if 2 * tail > 0.05:
            break
        left = k
    return {
        "mean": statistics.median(values),
        "low": ordered[left],
        "high": ordered[n - 1 - left],
    }


def peak() -> float:
    """MB, the most that this process has held so far.

    Not ru_maxrss: it begins at what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def measure_memory(key: str, folder: Path, ids: list[list[int]]) -> None:
    """Run by a process of its own: load one variant, answer, print the peak.

    An ONNX file is read by ONNX Runtime alone, as on a phone, without torch's model.
    """
    name, way = key.split(", ")
    if way.startswith("torchao"):
        quiet_torchao()
    if way.startswith("ONNX"):
        import onnxruntime  # noqa: F401
    else:
        models.load_tokenizer("teacher")
        from transformers import LlamaForCausalLM  # noqa: F401
    before = peak()
    if way.startswith("ONNX"):
        suffix = "-int8" if way.endswith("int8") else ""
        model = OnnxModel(folder / f"{name}{suffix}.onnx")
    else:
        model, _ = prepared(name, way, folder)
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]), use_cache=False)
    print(json.dumps({"before": before, "peak": peak()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "phone_latency.json")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models.quiet_transformers()
    data = None if options.memory else phone.Data()
    if options.memory:
        measure_memory(options.memory, options.folder, json.loads(sys.stdin.read()))
        return
    asked = {name: requests(data, SIDE[name]) for name in MODELS}
    test = data.batches(data.test)
    reference = teacher_reference(LiveTeacher(data.teacher), test)
    rows, variants = {}, {}
    with tempfile.TemporaryDirectory(prefix="kdlib-phone-") as scratch:
        folder = Path(scratch)
        for name in MODELS:
            for way in WAYS:
                key = f"{name}, {way}"
                variants[key], size = prepared(name, way, folder)
                found = evaluate(variants[key], test, reference, side=SIDE[name])
                rows[key] = {
                    "file": size,
                    "exact": found.exact_match,
                    "kl": found.kl,
                    "agreement": found.agreement,
                }
                print(
                    f"{key}: {found.exact_match:.3f}, {size / 1e6:.2f} MB", flush=True
                )
        for key in variants:
            command = [sys.executable, __file__, "--memory", key, "--folder", scratch]
            given = json.dumps([t[0].tolist() for t in asked[key.split(", ")[0]]])
            done = subprocess.run(command, input=given, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            rows[key]["memory"] = json.loads(done.stdout)
        one_round(variants, asked)  # the first passes set things up
        rounds = [one_round(variants, asked) for _ in range(options.rounds)]
    for key in variants:
        times = [r[key] for r in rounds]
        rows[key]["ms"] = median_interval(times)
        base = [r["teacher, torch"] for r in rounds]
        ratio = [b / t for b, t in zip(base, times, strict=True)]
        rows[key]["times faster than teacher, torch"] = median_interval(ratio)
        way = key.split(", ")[1]
        plain = f"{key.split(', ')[0]}, {way.split(' int8')[0]}"
        plain = plain.replace("torchao", "torch")
        ratio = [r[plain] / r[key] for r in rounds]
        rows[key]["times faster than float32"] = median_interval(ratio)
    draft = {
        way: median_interval(
            [r[f"student, {way}"] / r[f"teacher, {way}"] for r in rounds]
        )
        for way in WAYS
    }
    result = {
        **provenance(command_of("phone_latency.py", {"rounds": options.rounds})),
        **{name: version(name) for name in ("torchao", "onnx", "onnxruntime")},
        "onnxscript": version("onnxscript"),
        "threads": 1,
        "rounds": options.rounds,
        "requests": REQUESTS,
        "tokens": {
            name: statistics.mean(t.shape[1] for t in asked[name]) for name in MODELS
        },
        "test": len(data.test),
        "rows": rows,
        "draft": draft,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
