"""The remote teacher: targets from an OpenAI-compatible server's prompt logprobs.

vLLM's protocol is the reference. The teacher's view of a row, prompt and response, is
sent as token ids; the answer holds the k likeliest tokens for every position:

    POST /v1/completions  {"prompt": [ids], "max_tokens": 1, "prompt_logprobs": k}
    choices[0].prompt_logprobs:  [null, {"ID": {logprob, rank, decoded_token}, ..}, ..]

Entry j is the distribution that predicted token j, so a response token at column c has
entry c: what a live teacher's logits say at c - 1. vLLM adds the token that was sent
where it is not among the k. That proves that both sides count positions alike; it is
not kept.

Prompt logprobs are the model's at temperature 1, whatever a request asks for (vLLM's
default, --logprobs-mode raw_logprobs), and without the rest of the vocabulary they
cannot be tempered. So the targets say temperature 1, and an objective or a cache with
another one refuses them.

For k above 20 start vLLM with `--max-logprobs K`. Its --max-model-len must exceed the
longest row. Some versions give stale logprobs from cached prefixes (vLLM issue 42019);
`--no-enable-prefix-caching` is safe.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from kdlib.errors import ArgumentError, ModelError
from kdlib.json_server import JsonServer, quoted
from kdlib.sparse_targets import TAILS, SparseTargets
from kdlib.views import PairedBatch

# Else the model's generation_config.json chooses, and a server that was started with
# --logprobs-mode processed_logprobs would apply what it chose.
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
Kept = list[tuple[int, float]]  # k tokens and their log-probabilities, likeliest first


class RemoteTeacher:
    """A served teacher that is asked at every batch.

    url:       of the server: "http://HOST:PORT", with or without /v1
    tokenizer: the one that writes the teacher's prompts; the server's must be the same
    model:     its name on the server; not needed where one model is served
    k, tail:   as in sparse.py
    workers:   requests under way at a time, a row each; the server batches them
    timeout, retries, api_key: as in json_server.py

    `targets` raises ModelError, naming the server and the remedy, where it cannot be
    reached, is too slow, refuses, has another tokenizer, or answers something else than
    log-probabilities for exactly the tokens that were sent.
    """

    def __init__(
        self,
        url: str,
        tokenizer,
        *,
        model: str | None = None,
        k: int = 8,
        tail: str = "bucket",
        workers: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        api_key: str | None = None,
    ):
        if tail not in TAILS:
            raise ArgumentError(f"tail={tail!r}", f"choose one of {TAILS}")
        for name, value in (("k", k), ("workers", workers)):
            if value < 1:
                raise ArgumentError(f"{name}={value}", "use 1 or more")
        self._server = JsonServer(
            url.rstrip("/").removesuffix("/v1"),
            timeout=timeout,
            retries=retries,
            api_key=api_key,
        )
        self.tokenizer, self.k, self.tail, self.workers = tokenizer, k, tail, workers
        self._model = model
        self._spellings = cache(self._spell)

    @property
    def model(self) -> str:
        """The model's name on the server."""
        if self._model is None:
            answer = self._server.ask("/v1/models")
            try:
                names = [entry["id"] for entry in answer["data"]]
            except (KeyError, TypeError) as error:
                raise self._fault(
                    "the list of models cannot be read", answer
                ) from error
            if len(names) != 1:
                raise ArgumentError(
                    f"{self._server.url} serves {len(names)} models: {names}",
                    "give the name of one of them as model",
                )
            self._model = names[0]
        return self._model

    def fingerprint(self) -> str:
        """What a cache remembers of its teacher, whose weights are out of sight."""
        return f"served as {self.model}"

    def targets(self, batch: PairedBatch) -> SparseTargets:
        """[N, k] the targets of each response token, row after row."""
        view, model, stop = batch.teacher.to("cpu"), self.model, threading.Event()

        def row(ids: torch.Tensor, real: torch.Tensor, asked: torch.Tensor):
            if stop.is_set():  # another row has failed: nobody waits for this one
                return []
            try:
                return self._row(model, stop, ids[real].tolist(), asked[real])
            except Exception:
                stop.set()
                raise

        with ThreadPoolExecutor(self.workers) as pool:
            sides = view.input_ids, view.attention_mask, view.completion_mask
            try:
                found = [
                    kept for kept_row in pool.map(row, *sides) for kept in kept_row
                ]
            finally:
                stop.set()  # on Ctrl-C, too
        return SparseTargets(
            torch.tensor([[token for token, _ in kept] for kept in found]),
            torch.tensor([[value for _, value in kept] for kept in found]),
            self.tail,
        ).to(batch.response_ids.device)

    def _row(self, model: str, stop, ids: list[int], asked: torch.Tensor) -> list[Kept]:
        """What is kept for each position of a row at which `asked` is True."""
        body = {
            "model": model,
            "prompt": ids,
            "max_tokens": 1,
            "prompt_logprobs": self.k,
            "return_tokens_as_token_ids": True,
            **NEUTRAL,
        }
        answer = self._server.ask("/v1/completions", body, stop)
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
            if not isinstance(entries, list):
                raise TypeError
        except (KeyError, IndexError, TypeError) as error:
            raise self._fault("the answer has no prompt_logprobs", answer) from error
        if len(entries) != len(ids):
            raise self._fault(
                f"{len(entries)} positions came back for {len(ids)} tokens"
            )
        return [
            self._kept(entries[place], ids[place], f"position {place}")
            for place in asked.nonzero()[:, 0].tolist()
        ]

    def _kept(self, entry, sent: int, where: str) -> Kept:
        """The k best of one position's entry, once it is proven sound."""
        try:
            found = sorted(
                (int(said["rank"]), -float(said["logprob"]), int(token), said)
                for token, said in entry.items()
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._fault(f"{where} cannot be read", entry) from error
        if sent not in [token for _, _, token, _ in found]:
            raise self._fault(
                f"{where} lacks token {sent}, which was sent there", entry
            )
        for _, _, token, said in found:
            self._compare(token, said.get("decoded_token"))
        kept = [(token, -value) for _, value, token, _ in found[: self.k]]
        if len(kept) < self.k:
            raise self._fault(f"{where} has {len(kept)} tokens, not k={self.k}", entry)
        total = math.fsum(math.exp(min(value, 1.0)) for _, value in kept)
        # NaN, or most raw logits: the likeliest tokens' are well above zero.
        if not total < 1.001:
            raise ModelError(
                f"{self._server.url}: probabilities of {where} sum to {total:.3f}",
                "start vLLM with --logprobs-mode raw_logprobs, its default",
            )
        return kept

    def _compare(self, token: int, spelt: str | None) -> None:
        """The server's token must be spelt as ours."""
        if not isinstance(spelt, str):
            raise ModelError(
                f"{self._server.url} gives no decoded_token, so that its tokenizer "
                "cannot be compared",
                "start the server with its tokenizer",
            )
        ours = self._spellings(token)
        if spelt.strip() not in ours and "\ufffd" not in "".join(ours):
            here = repr(ours[0]) if ours else "nothing"
            raise ModelError(
                f"{self._server.url} has another tokenizer: token {token} is {spelt!r} "
                f"there and {here} here",
                "give the served model's tokenizer; between two vocabularies, train on "
                "the teacher's responses as text (sequence-level targets)",
            )

    def _spell(self, token: int) -> tuple[str, ...]:
        """How vLLM may spell a token: as text or, in older versions, as in its file.

        Half a character is U+FFFD by itself; newer versions spell it by its neighbours.
        """
        if not 0 <= token < len(self.tokenizer):
            return ()
        as_text = self.tokenizer.decode([token])
        as_stored = str(self.tokenizer.convert_ids_to_tokens(token))
        return as_text.strip(), as_stored.strip()

    def _fault(self, what: str, answer="") -> ModelError:
        return ModelError(
            f"{self._server.url}: {what}"
            + (f": {quoted(answer)}" if answer != "" else ""),
            "use a server that answers prompt_logprobs as vLLM does",
        )
