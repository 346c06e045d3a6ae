"""At home elsewhere: transformers' Trainer, peft, vLLM, llama.cpp, datasets.

Packages that kdlib does not ask for are skipped where they are not installed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from kdlib import localize, models
from kdlib.errors import ModelError
from kdlib.examples import read_examples
from kdlib.gradients import accumulate_gradient, student_logits
from kdlib.objective import Objective
from kdlib.pairs import PairCollator
from kdlib.sampling import complete
from kdlib.settings import TrainConfig
from kdlib.teachers import LiveTeacher
from kdlib.train import train

EXPERIMENTS = Path(__file__).parents[1] / "notebooks" / "experiments"
CONFIG = TrainConfig(steps=4, batch_size=4, learning_rate=1e-2, checkpoint_every=2)
REVERSE = Objective("reverse_kl")


@pytest.fixture(scope="module")
def shipped():
    return models.load("teacher")


@pytest.fixture(scope="module")
def tokenizer(shipped):
    return shipped[1]


@pytest.fixture(scope="module")
def teacher(shipped):
    return LiveTeacher(shipped[0])


@pytest.fixture(scope="module")
def collator(tokenizer):
    return PairCollator(tokenizer)


@pytest.fixture(scope="module")
def pairs(collator):
    short = localize.examples("train", locales=["fr"], limit=8)[:8]
    # Responses of unequal length: a mean of means would be another number.
    long = [replace(e, response=e.response * k) for k, e in enumerate(short, 1)]
    return [collator.encode(example, i) for i, example in enumerate(long)]


def small(tokenizer, seed=0):
    return models.build(tokenizer, hidden_size=16, layers=1, heads=2, seed=seed)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def experiment(name, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


# --- transformers.Trainer -----------------------------------------------------------


@pytest.fixture
def run_trainer(monkeypatch, tmp_path, tokenizer, teacher, collator, pairs):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    example = experiment("hf_trainer", monkeypatch)

    def run(objective, rows, parts, rate):
        student = small(tokenizer)
        trainer = example.DistillationTrainer(
            student,
            TrainingArguments(
                str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=parts,
                learning_rate=rate,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
            ),
            data_collator=example.TrainerCollator(collator),
            train_dataset=pairs,
            objective=objective,
            teacher=teacher,
        )
        trainer.train()
        return weights(student), trainer.state.log_history[0]["loss"]

    return run


@pytest.mark.parametrize(
    "objective",
    [Objective(), Objective("reverse_kl", temperature=2.0, hard_weight=0.3)],
)
def test_trainer_takes_the_step_of_the_whole_batch(
    run_trainer, tokenizer, teacher, collator, pairs, objective
):
    """Gradient descent by hand on the whole batch, however Trainer splits it."""
    rate = 0.1
    by_hand = small(tokenizer)
    found = accumulate_gradient(by_hand, [collator.collate(pairs)], objective, teacher)
    gradient = torch.cat([p.grad.flatten() for p in by_hand.parameters()])
    wanted = weights(by_hand) - rate * gradient
    for rows, parts in ((8, 1), (2, 4), (1, 8)):
        got, loss = run_trainer(objective, rows, parts, rate)
        assert float(loss) == pytest.approx(found.loss, rel=1e-3)
        assert (got - wanted).norm() < 1e-4 * (rate * gradient).norm()


def test_the_trainer_example_runs(monkeypatch, capsys):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", "--steps", "10"])
    experiment("hf_trainer", monkeypatch).main()
    losses = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    first, last = (float(line.split("'loss': '")[1].split("'")[0]) for line in losses)
    assert last < first


# --- peft ---------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="LoRA students need peft")


def test_lora_without_peft_says_what_is_missing(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match="pip install peft"):
        models.add_lora(small(tokenizer))


def test_only_the_adapters_of_a_lora_student_train(
    peft, tokenizer, teacher, collator, pairs
):
    plain = small(tokenizer)
    before = copy.deepcopy(plain)
    state = torch.get_rng_state()
    student = models.add_lora(plain, rank=4)
    assert torch.equal(torch.get_rng_state(), state)
    batch = collator.collate(pairs)
    assert torch.equal(student_logits(student, batch), student_logits(before, batch))
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    # A Llama block has seven linear layers, each with an A and a B.
    assert len(trained) == 14 and all("lora_" in name for name in trained)
    then = {name: p.detach().clone() for name, p in student.named_parameters()}
    history = train(student, pairs, collator, REVERSE, CONFIG, teacher=teacher)
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, then[n])}
    assert moved == trained
    assert history.loss[-1] < history.loss[0]


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"activation_checkpointing": True},
        {"lmbda": 1.0, "max_new_tokens": 4},
    ],
)
def test_a_lora_student_trains_in_every_way(
    peft, tokenizer, teacher, collator, pairs, options
):
    student = models.add_lora(small(tokenizer), rank=4)
    settings = student.get_base_model().generation_config
    config = replace(CONFIG, **options)
    history = train(student, pairs, collator, REVERSE, config, teacher=teacher)
    assert history.grad_norm[0] > 0 and weights(student).isfinite().all()
    assert student.get_base_model().generation_config is settings
    if "lmbda" not in options:
        plain = models.add_lora(small(tokenizer), rank=4)
        expected = train(plain, pairs, collator, REVERSE, CONFIG, teacher=teacher)
        assert history.loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_lora_run_resumes(peft, tokenizer, teacher, collator, pairs, tmp_path):
    ends = []
    for folder, stops in (("whole", [4]), ("parts", [3, 4])):
        for stop in stops:

            def until(step, loss, stop=stop):
                if step == stop < CONFIG.steps:
                    raise KeyboardInterrupt

            student = models.add_lora(small(tokenizer), rank=4)
            run = dict(teacher=teacher, folder=tmp_path / folder, on_step=until)
            try:
                train(student, pairs, collator, REVERSE, CONFIG, **run)
            except KeyboardInterrupt:
                continue
        ends.append(weights(student))
    assert torch.equal(*ends)


@pytest.mark.parametrize(("options", "alpha"), [({}, 8), ({"alpha": 20.0}, 20)])
def test_a_lora_student_is_saved_as_adapters_or_merged(
    peft, tokenizer, teacher, collator, pairs, tmp_path, options, alpha
):
    base = models.save(small(tokenizer), tokenizer, tmp_path / "base")
    student = models.add_lora(models.load(base)[0], rank=4, **options)
    train(student, pairs, collator, REVERSE, CONFIG, teacher=teacher)
    batch = collator.collate(pairs)
    with torch.no_grad():
        wanted = student_logits(student, batch)
        untrained = student_logits(models.load(base)[0], batch)
    assert (wanted - untrained).abs().max() > 0.01

    folder = models.save(student, tokenizer, tmp_path / "adapters")
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} < names
    assert "model.safetensors" not in names and "tokenizer.json" in names
    again = peft.PeftModel.from_pretrained(models.load(base)[0], folder)
    with torch.no_grad():
        assert torch.equal(student_logits(again, batch), wanted)

    layer = student.get_base_model().model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    by_hand = layer.base_layer.weight + alpha / 4 * b @ a
    whole = models.merged(student)
    merged_weight = whole.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged_weight, by_hand)
    assert models.merged(whole) is whole
    folder = models.save(whole, tokenizer, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad():
        assert torch.allclose(student_logits(merged, batch), wanted, atol=1e-5)


# --- The folder of a saved student ------------------------------------------------
#
# What is read, from the sources of both (November 2026):
#   vLLM       config.json through AutoConfig (architectures, model_type, dtype,
#              max_position_embeddings), generation_config.json (where answers end, and
#              defaults of sampling), the tokenizer and its chat template through
#              AutoTokenizer, *.safetensors
#   llama.cpp  conversion/base.py and llama.py: config.json, model*.safetensors, the
#              tokenizer through AutoTokenizer (no id may reach vocab_size), and
#              gguf.SpecialVocab: merges of tokenizer.json, special tokens of
#              tokenizer_config.json, chat_template.jinja


@pytest.fixture(scope="module")
def folder(tokenizer, teacher, collator, pairs, tmp_path_factory):
    student = small(tokenizer)
    train(student, pairs, collator, REVERSE, CONFIG, teacher=teacher)
    return models.save(student, tokenizer, tmp_path_factory.mktemp("saved") / "student")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_folder_holds_what_servers_and_converters_read(folder, tokenizer):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    config = read(folder / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama" and config["dtype"] == "float32"
    assert config["max_position_embeddings"] == tokenizer.model_max_length
    assert config["tie_word_embeddings"] is True
    # hyperparameters that llama.cpp writes for a Llama
    assert {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "vocab_size",
    } <= config.keys()
    assert max(tokenizer.get_vocab().values()) < config["vocab_size"]
    end = tokenizer.eos_token_id
    generation = read(folder / "generation_config.json")
    assert generation["eos_token_id"] == config["eos_token_id"] == end
    # Defaults that a server would take over must not change what was distilled.
    assert not {"temperature", "top_k", "top_p", "repetition_penalty"} & {
        name for name, value in generation.items() if value is not None
    }
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == tokenizer.chat_template
    settings = read(folder / "tokenizer_config.json")
    assert settings["eos_token"] == models.END and settings["pad_token"] == models.PAD
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        stored = set(file.keys())
    # Tied: the head is the embedding, and both loaders take a missing head for that.
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored


def test_plain_transformers_answers_as_here(folder, tokenizer, pairs):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "12 March 2024"}]
    prompt = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert prompt == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor([prompt])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    ours = complete(
        models.load(folder)[0], tokenizer, [prompt], max_new_tokens=8, keep_end=True
    )
    assert answer[0, len(prompt) :].tolist() == ours[0]


def test_llama_cpp_finds_merges_special_tokens_and_template(folder, tokenizer):
    gguf = pytest.importorskip("gguf", reason="llama.cpp's converter uses gguf")
    vocab = gguf.SpecialVocab(folder, load_merges=True)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert vocab.merges == [" ".join(merge) for merge in merges]
    assert vocab.special_token_ids["eos"] == tokenizer.eos_token_id
    assert vocab.special_token_ids["pad"] == tokenizer.pad_token_id
    assert vocab.chat_template == tokenizer.chat_template


@pytest.mark.parametrize("ends", [None, 5, [5, 6]])
def test_a_server_ends_answers_where_training_did(tokenizer, tmp_path, ends):
    """A base model whose tokenizer was given the end of a turn as its end token."""
    student = small(tokenizer)
    student.generation_config.eos_token_id = ends
    saved = models.save(student, tokenizer, tmp_path / "m")
    wanted = [tokenizer.eos_token_id] + ([ends] if ends == 5 else ends or [])
    assert read(saved / "generation_config.json")["eos_token_id"] == wanted
    saved = models.save(models.load(saved)[0], tokenizer, tmp_path / "m")
    assert read(saved / "generation_config.json")["eos_token_id"] == wanted


# --- Data and real models -----------------------------------------------------------


def test_rows_of_a_datasets_dataset_are_examples():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = [
        {"user_input": "a", "response": "b", "context": "c"},
        {"user_input": "d", "response": "e"},
    ]
    table = datasets.Dataset.from_list(rows)
    assert table[1]["context"] is None  # the column of another row
    examples = read_examples(table)
    assert [e.context for e in examples] == ["c", ""]
    assert [e.user_input for e in examples] == ["a", "d"]


def test_the_smollm2_experiments_with_a_small_model(shipped, monkeypatch, capsys):
    common = experiment("smollm2_common", monkeypatch)
    asked, held_out = common.questions(False), common.questions(True)
    assert not set(asked) & set(held_out)
    subjects = [{q.strip(".?").split()[-1] for q in part} for part in (asked, held_out)]
    assert not subjects[0] & subjects[1]
    options = argparse.Namespace(
        questions=8, new_tokens=6, steps=3, batch_size=4, learning_rate=1e-3, seed=0
    )
    found = common.compare(
        *shipped, lambda m: models.first_layers(m, 2), options, context="be brief"
    )
    rows = found["rows"]
    assert list(rows) == [
        "teacher",
        "student as it begins",
        "hard labels, equal tokens",
        "hard labels, equal FLOPs",
        "distilled",
    ]
    assert rows["teacher"]["kl"] == 0 and rows["teacher"]["agreement"] == 1
    assert rows["distilled"]["kl"] < rows["student as it begins"]["kl"]
    assert rows["hard labels, equal FLOPs"]["steps"] > 3
    begins, hard = rows["student as it begins"], rows["hard labels, equal tokens"]
    assert hard["nll"] < begins["nll"] and hard["steps"] == 3
