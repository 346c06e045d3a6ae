"""A server of the shipped teacher that speaks vLLM's prompt logprobs, and breaks them.

    python tests/logprob_server.py        prints its port, then serves until it is ended

The first part of a path names the fault: /hang/v1/completions hangs, /good/... answers.
GET /FAULT/count tells how many requests that fault got, GET /FAULT/last the last one.

It shares no code with kdlib/remote.py: distributions are taken from the model in
float64, row by row and without padding.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from kdlib import models

MAX_LOGPROBS = 20  # vLLM's default for --max-logprobs
MODEL, TOKENIZER = models.load("teacher", dtype=torch.float64)
TEXT = [TOKENIZER.decode([token]) for token in range(len(TOKENIZER))]
LOCK = threading.Lock()
SEEN: dict[str, list[dict]] = {}


@torch.no_grad()
def prompt_logprobs(ids, k, fault):
    """The list of vLLM: null, then one dict a position, the actual token first."""
    with LOCK:
        logits = MODEL(input_ids=torch.tensor([ids])).logits[0]
    values = logits.log_softmax(-1)
    if fault == "raw-logits":
        values = logits
    entries = [None]
    tops = values.topk(k).indices.tolist()
    for row, top, actual in zip(values.tolist(), tops, ids[1:], strict=False):
        rank = sum(value >= row[actual] for value in row)
        named = {actual: rank} | {t: place for place, t in enumerate(top, 1)}
        entries.append({str(t): entry(t, row[t], r, fault) for t, r in named.items()})
    return entries


def entry(token, value, rank, fault):
    text = TEXT[token]
    if fault == "other-tokenizer":
        text = TEXT[(token + 1) % len(TEXT)]
    if fault == "pieces":  # as older versions did
        text = TOKENIZER.convert_ids_to_tokens(token)
    if fault == "half-characters" and "\ufffd" in text:
        text = "\u00e9"  # newer versions spell them by their neighbours
    said = {"logprob": value, "rank": rank, "decoded_token": text}
    if fault == "no-spelling":
        said["decoded_token"] = None
    if fault == "no-rank":
        said["rank"] = None
    if fault == "nan":
        said["logprob"] = float("nan")
    return said


def spoilt(entries, fault):
    if fault == "short":
        return entries[:-1]
    if fault == "long":
        return [None, *entries]
    if fault == "shifted":  # as if a bos token had been put before the prompt
        return [None, None, *entries[1:-1]]
    if fault == "null":
        return None
    if fault == "holes":
        return [None] * len(entries)
    if fault == "few":
        return [e and dict(list(e.items())[:2]) for e in entries]
    if fault == "unknown-token":
        extra = {"logprob": -1.0, "rank": 1, "decoded_token": "x"}
        return [e and {**e, "1000000": extra} for e in entries]
    return entries


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        _, fault, *rest = self.path.split("/")
        if rest == ["count"]:
            return self.send(200, {"count": len(SEEN.get(fault, []))})
        if rest == ["last"]:
            return self.send(200, SEEN[fault][-1])
        names = {"many-models": ["a", "b"], "odd-models": None}.get(fault, ["teacher"])
        self.send(200, {"data": names and [{"id": name} for name in names]})

    def do_POST(self):
        _, fault, *rest = self.path.split("/")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization")
        with LOCK:
            SEEN.setdefault(fault, []).append({"key": key, **body})
            count = len(SEEN[fault])
        if rest != ["v1", "completions"]:
            return self.send(404, {"detail": "Not Found"})
        if fault == "hang":
            time.sleep(60)
        if fault == "late" and count == 1:
            time.sleep(0.5)  # the first row's answer comes last
        if fault == "html":
            return self.send(200, b"<html>Welcome</html>", "text/html")
        if fault == "drop":
            return self.hang_up()
        if fault == "key" and key != "Bearer sesame":
            return self.send(401, {"error": "Unauthorized"})
        if fault == "down" or (fault.startswith("shaky") and count <= 2):
            return self.send(500, {"error": {"message": "engine died"}})
        if fault == "busy" and count == 1:
            return self.send(429, {"error": {"message": "slow down"}})
        if fault == "drop-once" and count == 1:
            return self.hang_up()
        if body["prompt_logprobs"] > MAX_LOGPROBS:
            message = f"Requested prompt logprobs of {body['prompt_logprobs']}"
            error = {"message": f"{message}, which is greater than max allowed: 20"}
            return self.send(400, {"error": error})
        entries = prompt_logprobs(body["prompt"], body["prompt_logprobs"], fault)
        choice = {"index": 0, "text": "", "prompt_logprobs": spoilt(entries, fault)}
        answer = {"object": "text_completion", "model": "teacher", "choices": [choice]}
        if fault == "no-choices":
            answer["choices"] = []
        self.send(200, answer, fault=fault, count=count)

    def send(self, status, content, kind="application/json", fault="", count=0):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "trickle":  # two seconds, and no pause that a read would notice
            for i in range(40):
                self.wfile.write(content[i : i + 1])
                time.sleep(0.05)
            self.wfile.write(content[40:])
        elif fault == "cut" or (fault == "cut-once" and count == 1):
            self.wfile.write(content[: len(content) // 2])
            self.hang_up()
        else:
            self.wfile.write(content)

    def hang_up(self):
        self.close_connection = True
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients of /hang and /trickle go away


if __name__ == "__main__":
    torch.set_num_threads(1)
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    sys.exit(server.serve_forever())
