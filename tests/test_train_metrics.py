"""What a run tells about itself: the numbers, the file, TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from kdlib import localize, metrics, models
from kdlib.errors import StorageError
from kdlib.metrics import Record, fidelity, flops_per_token, peak_flops, quarters
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.sparse_targets import sampled_targets, top_k_targets
from kdlib.teachers import LiveTeacher
from kdlib.train import TrainConfig, train


def logits_of(*rows):
    return torch.tensor(rows).log()


# --- Student against teacher ---

# Two tokens whose numbers can be found by hand.
TEACHER = logits_of([0.5, 0.25, 0.25], [0.5, 0.5, 0.0])
STUDENT = logits_of([0.25, 0.5, 0.25], [0.5, 0.25, 0.25])


def test_fidelity_by_hand():
    found = fidelity(STUDENT, TEACHER)
    log2 = math.log(2)
    # KL: 1/2 log 2 - 1/4 log 2 + 0 = 1/4 log 2; 0 + 1/2 log 2.
    assert found["kl"] == pytest.approx((0.25 + 0.5) / 2 * log2)
    assert found["agreement"] == 0.5
    # H(1/2, 1/4, 1/4) = 3/2 log 2 on the student's side twice; teacher's second log 2.
    assert found["entropy_gap"] == pytest.approx((3.0 - (1.5 + 1.0)) / 2 * log2)
    assert set(found) == {"kl", "agreement", "entropy_gap"}


def test_fidelity_to_sparse_targets():
    found = fidelity(STUDENT, top_k_targets(TEACHER, 1))
    log2 = math.log(2)
    # One token and the rest: (1/2, 1/2) against (1/4, 3/4) and (1/2, 1/2).
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found["kl"] == pytest.approx(first / 2)
    assert found["teacher_mass"] == pytest.approx(0.5)
    assert found["agreement"] == 0.5
    two = fidelity(STUDENT, top_k_targets(TEACHER, 2))
    assert two["teacher_mass"] == pytest.approx((0.75 + 1.0) / 2)
    at_two = top_k_targets(TEACHER, 3, temperature=2.0)
    square_roots = fidelity(STUDENT, at_two)["kl"]
    assert 0 < square_roots < 0.375 * log2
    sampled = sampled_targets(TEACHER, 5, torch.Generator().manual_seed(0))
    assert set(fidelity(STUDENT, sampled)) == {"kl"}


def test_mass_off_support_by_hand():
    def of(targets, student=STUDENT):
        return float(fidelity(student, targets)["off_support"])

    # The likeliest is token 0 in both rows, of which the student has 1/4 and 1/2.
    assert of(top_k_targets(TEACHER, 1)) == pytest.approx((0.75 + 0.5) / 2)
    # {0, 1 or 2} and {0, 1}: the student has 3/4 or 1/2, and 3/4.
    found = top_k_targets(TEACHER[1:], 2)
    assert of(found, STUDENT[1:]) == pytest.approx(0.25)
    assert of(top_k_targets(TEACHER, 3)) == pytest.approx(0.0, abs=1e-6)
    # At T = 2 the student's (1/4, 1/2, 1/4) is (1/2, sqrt(1/2), 1/2) normalised.
    tempered = top_k_targets(TEACHER[:1], 1, temperature=2.0)
    off = 1 - 0.5 / (1 + math.sqrt(0.5))
    assert of(tempered, STUDENT[:1]) == pytest.approx(off)
    # Columns that the teacher lacks are in neither softmax.
    wide = torch.cat([STUDENT, torch.full((2, 1), 50.0)], dim=-1)
    assert of(top_k_targets(TEACHER, 1), wide) == pytest.approx(0.625)


def test_kl_by_quarter_by_hand():
    """Two responses, of one token and of four, each token with a KL of its own."""
    shares = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.55], dtype=torch.float64)
    teacher = torch.stack([shares, 1 - shares], -1).log()
    student = torch.zeros(5, 2, dtype=torch.float64)
    kl = [p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p) for p in shares.tolist()]
    quarter = quarters(torch.tensor([0, 1, 1, 1, 1]))
    assert quarter.tolist() == [0, 0, 1, 2, 3]
    found = fidelity(student, teacher, quarter)
    assert found["kl_quarter_1"] == pytest.approx((kl[0] + kl[1]) / 2)
    for i in (2, 3, 4):
        assert found[f"kl_quarter_{i}"] == pytest.approx(kl[i])
    assert found["kl"] == pytest.approx(sum(kl) / 5)
    few = fidelity(student[:1], top_k_targets(teacher[:1], 1), quarter[:1])
    assert few["kl_quarter_1"] == few["kl"] and few["kl_quarter_4"].isnan()


def test_quarters_of_responses_of_any_length():
    for length in range(1, 12):
        ids = torch.tensor([3] * 5 + [7] * length)  # numbers may be left out
        wanted = [4 * i // length for i in range(length)]
        assert quarters(ids)[5:].tolist() == wanted
        assert quarters(ids)[:5].tolist() == [0, 0, 1, 2, 3]


def test_a_large_sample_keeps_tokens_and_quarters_together():
    rows = torch.arange(1000).repeat_interleave(8)
    quarter = quarters(rows)
    teacher = torch.stack([quarter.float(), torch.zeros(len(rows))], -1)
    student = torch.stack([torch.zeros(len(rows)), torch.zeros(len(rows))], -1)
    found = fidelity(student, teacher, quarter)
    for i in range(4):
        p = torch.tensor([float(i), 0.0]).softmax(-1)
        kl = float((p * (2 * p).log()).sum())
        assert found[f"kl_quarter_{i + 1}"] == pytest.approx(kl, abs=1e-6)


def test_fidelity_looks_at_a_spread_of_many_tokens():
    same, other = [0.9, 0.1], [0.1, 0.9]
    teacher = logits_of(*[same] * 4000)
    student = logits_of(*[same] * 1000, *[other] * 3000)
    assert fidelity(student, teacher)["agreement"] == pytest.approx(0.25, abs=0.01)
    assert metrics.sample(3, "cpu").tolist() == [0, 1, 2]


def test_padded_vocabularies_are_cut():
    wide = torch.cat([TEACHER, torch.full((2, 1), 50.0)], dim=-1)
    assert fidelity(STUDENT, wide) == fidelity(STUDENT, TEACHER)


# --- Floating-point operations ---


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    for tied in (True, False):
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        model, length = LlamaForCausalLM(config), 40
        ids = torch.arange(length)[None]
        with FlopCounterMode(display=False) as forward:
            logits = model(input_ids=ids, use_cache=False).logits
        ours = length * flops_per_token(model, length, training=False)
        # Norms have parameters and no products; rotary angles a few products.
        assert ours == pytest.approx(forward.get_total_flops(), rel=0.01)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
        whole = forward.get_total_flops() + backward.get_total_flops()
        ours = length * flops_per_token(model, length, training=True)
        assert ours == pytest.approx(whole, rel=0.01)


def test_frozen_weights_cost_no_gradient():
    tokenizer = models.load("teacher")[1]
    model = models.build(tokenizer, hidden_size=16, layers=1, heads=2)
    parameters = sum(p.numel() for p in model.parameters())
    whole = flops_per_token(model, 10, training=True)
    frozen = model.model.layers.requires_grad_(False)
    less = whole - flops_per_token(model, 10, training=True)
    assert less == 2 * sum(p.numel() for p in frozen.parameters())
    assert whole == 6 * parameters + 3 * (4 * 1 * 16 * 10)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("A card of tomorrow", None),
    ],
)
def test_the_peak_is_known_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
    assert peak_flops(torch.device("cuda"), "fp32") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


# --- The file ---


def write(record, step, **numbers):
    record.write(step, {"loss": 1.0, **numbers}, tokens=7)


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_line_is_there_once_it_is_written(tmp_path):
    record = Record(tmp_path, 0, 10)
    for step in (1, 2):
        write(record, step)
        assert steps(record.path) == list(range(1, step + 1))  # before close
    record.close()


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    record = Record(tmp_path, 0, 10)
    for step in range(1, 6):
        write(record, step)
    record.close()
    with record.path.open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    record = Record(tmp_path, 3, 10)
    assert steps(record.path) == [1, 2, 3]
    write(record, 4)
    record.close()
    assert steps(record.path) == [1, 2, 3, 4]
    record = Record(tmp_path, 0, 10)
    assert steps(record.path) == []
    record.close()


def test_a_number_that_is_not_finite_is_null(tmp_path):
    record = Record(tmp_path, 0, 10)
    write(record, 1, grad_norm=math.inf, kl=math.nan, peak_memory=None)
    record.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(record.path.read_text(), parse_constant=refuse)
    assert line["grad_norm"] is line["kl"] is line["peak_memory"] is None


def test_utilisation_is_time_at_the_peak_over_time(tmp_path, monkeypatch):
    now = iter([10.0, 14.0, 15.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    record = Record(tmp_path, 0, 10)
    record.write(1, {"loss": 1.0}, tokens=8, seconds_at_peak=1.0)
    record.write(2, {"loss": 1.0}, tokens=8, seconds_at_peak=0.5)
    record.close()
    first, second = map(json.loads, record.path.read_text().splitlines())
    assert (first["mfu"], first["tokens_per_s"]) == (0.25, 2.0)
    assert (second["mfu"], second["tokens_per_s"]) == (0.5, 8.0)


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            self.made, self.scalars, self.closed = (folder, purge_step), [], False
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.closed = True

    writers = []
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    record = Record(tmp_path, 4, 10)
    record.write(5, {"loss": 2.0, "kl": math.nan}, tokens=7)
    record.close()
    (writer,) = writers
    assert writer.made == (tmp_path / "tensorboard", 5) and writer.closed
    assert ("loss", 2.0, 5) in writer.scalars and ("tokens", 7, 5) in writer.scalars
    assert not [s for s in writer.scalars if s[0] in ("step", "kl")]


def test_without_tensorboard_there_is_no_folder_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Record(tmp_path, 0, 10).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match="metrics.jsonl"):
        Record(tmp_path, 0, 10)


# --- The loop's lines ---


def test_the_loops_lines(tmp_path, monkeypatch):
    tokenizer = models.load("teacher")[1]
    collator = PairCollator(tokenizer)
    examples = localize.examples("train", locales=["fr"], limit=4)
    pairs = [collator.encode(e, i) for i, e in enumerate(examples)]
    student = models.build(tokenizer, hidden_size=16, layers=1, heads=2)
    teacher = models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=1)
    peak = 1e15
    monkeypatch.setattr("kdlib.run_folder.peak_flops", lambda device, precision: peak)
    config = TrainConfig(steps=4, batch_size=8, log_every=3)
    objective = Objective(hard_weight=0.25, temperature=2.0)
    history = train(
        student,
        pairs,
        collator,
        objective,
        config,
        teacher=LiveTeacher(teacher),
        folder=tmp_path,
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [SimpleNamespace(**json.loads(line)) for line in text.splitlines()]
    assert [line.step for line in lines] == [1, 2, 3, 4]
    assert [line.loss for line in lines] == history.loss
    assert [line.grad_norm for line in lines] == history.grad_norm
    assert [line.learning_rate for line in lines] == [config.rate(i) for i in range(4)]
    assert sum(line.tokens for line in lines) == history.tokens
    assert [hasattr(line, "kl") for line in lines] == [True, False, False, True]
    assert 0 < min(getattr(lines[3], f"kl_quarter_{i}") for i in range(1, 5))
    for line in lines:
        # 0.75 T^2 soft + 0.25 hard
        assert line.loss == pytest.approx(3.0 * line.soft + 0.25 * line.hard)
        assert line.peak_memory is None or line.peak_memory > 1e7
    # All eight examples are in every step, so its FLOPs are known.
    prompt = sum(len(p.student_prompt_ids) + len(p.response_ids) for p in pairs)
    taught = sum(len(p.teacher_prompt_ids) + len(p.response_ids) for p in pairs)
    wanted = prompt * flops_per_token(student, prompt / 8, training=True)
    wanted += taught * flops_per_token(teacher, taught / 8, training=False)
    assert len(pairs) == 8
    line = lines[1]
    seconds = line.tokens / line.tokens_per_s
    assert line.mfu * seconds * peak == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_the_step_s_flops_count_the_writing(tmp_path, monkeypatch, writer):
    """Those that torch counts in `generate` itself, and what it saves of a pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from kdlib.sampling import complete

    tokenizer = models.load("teacher")[1]
    collator = PairCollator(tokenizer)
    example = localize.examples("train", locales=["fr"], limit=1)[0]
    pair = collator.encode(example)

    def model(seed):
        model = models.build(tokenizer, hidden_size=64, layers=2, heads=1, seed=seed)
        model.set_attn_implementation("eager")  # whose products torch counts
        with torch.no_grad():  # so that the end token is never the likeliest
            model.lm_head.weight[tokenizer.eos_token_id] = 0
            model.lm_head.weight[7] *= 100
        return model.eval()

    student, teacher = model(0), model(1)
    peak, n = 1e15, 40
    monkeypatch.setattr("kdlib.run_folder.peak_flops", lambda device, precision: peak)

    def flops_of_a_step(folder, **options):
        config = TrainConfig(steps=1, batch_size=1, learning_rate=1e-12, **options)
        train(
            student,
            [pair],
            collator,
            Objective("reverse_kl"),
            config,
            teacher=LiveTeacher(teacher),
            folder=folder,
        )
        line = json.loads((folder / "metrics.jsonl").read_text())
        return line, line["mfu"] * line["tokens"] / line["tokens_per_s"] * peak

    said = {"student": {"lmbda": 1.0}, "teacher": {"sequence_level": True}}[writer]
    options = {**said, "max_new_tokens": n, "sampling_temperature": 0.0}
    line, found = flops_of_a_step(tmp_path / "written", **options)
    assert line[f"{writer}_written"] == 1.0
    assert line["tokens"] == len(pair.student_prompt_ids) + n
    prompt = getattr(pair, f"{writer}_prompt_ids")
    who = {"student": student, "teacher": teacher}[writer]
    with FlopCounterMode(display=False) as counter:
        complete(who, tokenizer, [prompt], max_new_tokens=n)
    width, layers, whole = 64, 2, len(prompt) + n
    past = len(prompt) ** 2 + sum(range(len(prompt) + 1, whole))
    saved = (
        2 * who.lm_head.weight.numel() * (len(prompt) - 1)  # logits of the prompt
        + 2 * sum(p.numel() for p in who.parameters())  # the last token is not read
        + 4 * layers * width * (whole**2 - past)  # a token attends to its past alone
    )
    writing = counter.get_total_flops() + saved

    read = [len(getattr(pair, f"{s}_prompt_ids")) + n for s in ("student", "teacher")]
    rest = read[0] * flops_per_token(student, read[0], training=True)
    rest += read[1] * flops_per_token(teacher, read[1], training=False)
    # Norms have parameters and no products; rotary angles a few products.
    assert found - rest == pytest.approx(writing, rel=0.01)
