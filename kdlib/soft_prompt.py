"""A context turned into a few trained vectors before the user's input.

    teacher reads   [ bos  c_1 ... c_m   z ]     m token embeddings
    student reads   [ bos  v_1 ... v_n   z ]     n trained vectors; all else frozen

The student is the teacher itself. Its user types z alone; the vectors are put where the
context would have stood. With one vector for each of the context's tokens, started from
their embeddings, it is the teacher with its context from the first step on. Fewer
vectors are a compression, and training looks for the best one: by the log-likelihood
of the teacher's output (hard_weight=1) or by a divergence, as for any student.

Knows a model's embeddings. Does not know losses, or how it is trained.

Source: Lester et al. 2021, The power of scale for parameter-efficient prompt tuning
(arXiv 2104.08691); for contexts, Wingate et al. 2022 (arXiv 2210.03162).
"""

from __future__ import annotations

import hashlib
import json
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kdlib.errors import ArgumentError, ModelError, StorageError
from kdlib.shards import whole_file

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

FORMAT = "kdlib-soft-prompt-1"


class SoftPrompt(torch.nn.Module):
    """A frozen causal LM that reads `vectors` after the first `at` tokens of a prompt.

    Stands wherever a causal LM does: in train, evaluate and complete. Only the vectors
    train.

    vectors: [n, H]
    at:      tokens before them, such as bos or the beginning of a chat template
    """

    def __init__(self, model, vectors: Float[Tensor, "n h"], at: int):
        super().__init__()
        width = model.get_input_embeddings().weight.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
            raise ArgumentError(
                f"vectors of shape {list(vectors.shape)}",
                f"give one or more rows of {width} numbers, the model's width",
            )
        self.model, self.at = model.requires_grad_(False), at
        self.vectors = torch.nn.Parameter(vectors.detach().clone())

    @classmethod
    def from_context(cls, model, collator, context: str, n: int | None = None):
        """n vectors in the place of a context, started from its own tokens.

        n: by default one for each token of the context (its separator or template
           included); fewer start from tokens spread evenly over it

        The place is found by comparing the prompts of both sides, so a chat template is
        followed whatever it looks like.

        Raises ArgumentError for a context without tokens, or more vectors than those.
        """
        full, _ = collator.teacher_side.prompt_ids(context, "x", 1, 0)
        short, _ = collator.student_side.prompt_ids("", "x", 1, 0)
        at = len(_common(full, short))
        after = len(_common(full[at:][::-1], short[at:][::-1]))
        own = full[at : len(full) - after]
        n = len(own) if n is None else n
        if not 1 <= n <= len(own):
            raise ArgumentError(
                f"n={n} vectors for a context of {len(own)} tokens",
                "give 1 to as many vectors as the context has tokens",
            )
        chosen = torch.tensor(own)[torch.linspace(0, len(own) - 1, n).round().long()]
        embedding = model.get_input_embeddings()
        return cls(model, embedding(chosen.to(embedding.weight.device)), at)

    def forward(self, input_ids, attention_mask=None, **options):
        """As the model's, with an output for each position of input_ids."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        output = self.model(**self._inputs(input_ids, attention_mask), **options)
        kept = self._kept(attention_mask)
        if output.hidden_states is not None:
            states = output.hidden_states
            output.hidden_states = tuple(_rows(state, kept) for state in states)
        output.logits = _rows(output.logits, kept)
        return output

    def forward_decoder(self, input_ids, attention_mask=None, **options):
        """The same without the output head: what the fused loss asks for."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        decoder = self.model.get_decoder()
        output = decoder(**self._inputs(input_ids, attention_mask), **options)
        output.last_hidden_state = _rows(
            output.last_hidden_state, self._kept(attention_mask)
        )
        return output

    def generate(self, input_ids, attention_mask, **options) -> Int64[Tensor, "B T"]:
        """Prompt and completion, as the model's `generate` gives them."""
        inputs = self._inputs(input_ids, attention_mask)
        return torch.cat([input_ids, self.model.generate(**inputs, **options)], 1)

    def train(self, mode: bool = True):
        """The model's dropout stays off: it is the teacher, and frozen."""
        super().train(mode)
        self.model.eval()
        return self

    def get_base_model(self):
        return self.model

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:  # config, get_output_embeddings, ..
            return getattr(super().__getattr__("model"), name)

    def _inputs(self, input_ids, attention_mask) -> dict[str, Tensor]:
        """Embeddings and mask [B, T + n], with the vectors in their place."""
        embedded = self.model.get_input_embeddings()(input_ids)
        batch, length, width = embedded.shape
        n, place = len(self.vectors), self._place(attention_mask)
        column = torch.arange(length + n, device=input_ids.device)
        vector = column - place  # [B, T + n], which of the vectors
        source = torch.where(vector < 0, column, column - n).clamp(0, length - 1)
        known = embedded.gather(1, source[..., None].expand(-1, -1, width))
        given = self.vectors[vector.clamp(0, n - 1)].to(known.dtype)
        is_vector = (vector >= 0) & (vector < n)
        mask = attention_mask.gather(1, source).masked_fill(is_vector, 1)
        embeds = torch.where(is_vector[..., None], given, known)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _kept(self, attention_mask) -> Int64[Tensor, "B T"]:
        """Where the outputs of the input's positions are. The last token before the
        vectors predicts the one after them, and so from the last vector."""
        column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        later = column >= self._place(attention_mask) - 1
        return column + later * len(self.vectors)

    def _place(self, attention_mask) -> Int64[Tensor, "B 1"]:
        """The column of the first vector; prompts may be padded on the left."""
        return attention_mask.long().argmax(1, keepdim=True) + self.at


def save_soft_prompt(prompt: SoftPrompt, path: str | Path) -> Path:
    """Write the vectors to a safetensors file, in one rename.

    Raises StorageError where it cannot be written.
    """
    path = Path(path)
    about = {"format": FORMAT, "at": prompt.at, "model": _name(prompt.model)}
    vectors = {"vectors": prompt.vectors.detach().cpu().contiguous()}
    with whole_file(path) as new:
        save_file(vectors, new, {"kdlib": json.dumps(about)})
    return path


def load_soft_prompt(model, path: str | Path) -> SoftPrompt:
    """The soft prompt of a file, before its model.

    Raises StorageError for a file that is missing or damaged, ModelError for a model of
    another kind than the one that the vectors were trained for.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get("kdlib", "{}"))
            vectors = file.get_tensor("vectors")
    except Exception as error:  # safetensors has exceptions of its own
        raise StorageError(
            f"{path} cannot be read as a soft prompt: {error}",
            "name a file written by save_soft_prompt, or copy it again",
        ) from error
    if about.get("format") != FORMAT or about["model"] != _name(model):
        raise ModelError(
            f"{path} is for the model {about.get('model')}; this is {_name(model)}",
            "load the model in front of which the soft prompt was trained",
        )
    return SoftPrompt(model, vectors, about["at"])


def _name(model) -> str:
    """Type and width, and a hash of some embeddings, the same in any dtype."""
    table = model.get_input_embeddings().weight.detach()
    some = table[:: max(1, len(table) // 256)].cpu().to(torch.bfloat16).contiguous()
    digest = hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{model.config.model_type}, width {table.shape[1]}, {digest[:16]}"


def _common(a: list[int], b: list[int]) -> list:
    """The equal pairs at the beginning of both."""
    return list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _rows(x: Float[Tensor, "B S H"], kept: Int64[Tensor, "B T"]):
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
