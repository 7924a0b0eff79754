"""A server of this process that speaks vLLM's interface over a tiny model, and can misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from thimble.tokens.tokenizer import load_tokenizer

# Given the path and the answer; returns another answer, or a status with a body, or bytes.
Change = Callable[[str, Any], Any]


class TinyServer(ThreadingHTTPServer):
    """``/v1/models``, ``/tokenize`` and ``/v1/completions`` with ``prompt_logprobs``."""

    daemon_threads = True

    def __init__(self, folder: Path, max_logprobs: int = 20, max_model_len: int = 64) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.tokenizer = load_tokenizer(folder)
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.failures: list[tuple[int, dict[str, str]]] = []  # what the next answers are instead
        self.change: Change = lambda path, answer: answer
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> TinyServer:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompt, k = body["prompt"], body["prompt_logprobs"]
        if k > self.max_logprobs:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed"
            return 400, {"error": {"message": f"{message}: {self.max_logprobs}", "code": 400}}
        if len(prompt) + body["max_tokens"] > self.max_model_len:
            return 400, {"error": {"message": "the prompt is too long", "code": 400}}
        log_probs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        rows: list[Any] = [None]
        for place in range(1, len(prompt)):
            before = log_probs[place - 1]
            # As vLLM does: the token itself first, then the likeliest.
            chosen = dict.fromkeys([prompt[place], *before.topk(k).indices.tolist()])
            ranks = {i: 1 + int((before > before[i]).sum()) for i in chosen}
            rows.append(
                {
                    str(i): {"logprob": float(before[i]), "rank": ranks[i], "decoded_token": "?"}
                    for i in chosen
                }
            )
        choice = {"index": 0, "text": "", "prompt_logprobs": rows, "prompt_token_ids": prompt}
        return 200, {"object": "text_completion", "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: TinyServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        entry = {"id": "tiny", "object": "model", "max_model_len": self.server.max_model_len}
        self.answer(200, {"object": "list", "data": [entry]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, dict(self.headers)))
        if self.path == "/tokenize":
            ids = self.server.tokenizer.encode(body["prompt"])
            self.answer(200, {"count": len(ids), "tokens": ids})
            return
        if self.server.failures:
            status, headers = self.server.failures.pop(0)
            self.answer(status, {"error": {"message": "not now"}}, headers)
            return
        self.answer(*self.server.complete(body))

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        content = self.server.change(self.path, content)
        if isinstance(content, tuple):
            status, content = content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client has gone
