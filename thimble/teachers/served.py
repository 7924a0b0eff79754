"""A teacher behind an OpenAI-compatible server that tells the log probabilities of a prompt (vLLM).

One row is one prompt of ids, with one token more, since the server says what each token's
probability was given those before it:

    prompt_logprobs[i]  is about token i, so it is the distribution after input i - 1

Row i must name token i itself, which every answer is held against: an answer shifted by one would
teach the student to say the last word again.

A server tells K probabilities at temperature 1. How the rest spreads at another temperature does
not follow from these, so no other temperature can be asked for, nor draws.

    vllm serve MODEL --max-logprobs 64 --max-model-len 4098
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from thimble.console import log
from thimble.errors import ConfigError, DataError, EnvironmentProblem
from thimble.objectives.sparse_targets import SparseTargets
from thimble.teachers.asked import Asked
from thimble.teachers.examples import Examples
from thimble.tokens.tokenizer import END_OF_TEXT, PROBE

LOOPBACK = ("localhost", "127.0.0.1", "::1")
RETRIED = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 30.0  # seconds between two attempts
ENTRY_BYTES = 512  # more than one token's entry takes in JSON
KEY = "TEACHER_API_KEY"
NO_LOGPROBS = "has no prompt_logprobs; thimble needs a server that gives them"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Text and key go to the server that was named, to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """Requests to one server, each tried ``retries`` times more when it may yet answer.

    ``url`` is that of the server, with or without ``/v1``: https, or http on this machine.
    ``timeout`` in seconds is for connecting and for each wait for bytes. The key, if one is needed,
    is the environment's TEACHER_API_KEY.
    """

    def __init__(self, url: str, *, timeout: float = 120.0, retries: int = 4) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{url} is not the address of a server, such as http://localhost:8000."
            )
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise ConfigError(
                f"{url} would send text and key unencrypted over the network. Use https, or a "
                f"tunnel: ssh -L 8000:localhost:{parts.port or 80} {parts.hostname}, and then "
                "http://localhost:8000."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries = timeout, retries
        local: dict[str, str] | None = (
            {} if parts.hostname in LOOPBACK else None
        )  # no proxy to this machine
        self.opener = urllib.request.build_opener(NoRedirect, urllib.request.ProxyHandler(local))

    def ask(self, path: str, body: dict[str, Any] | None = None, limit: int = 1 << 24) -> Any:
        """The JSON a request is answered with, of at most ``limit`` bytes.

        Raises EnvironmentProblem when the server is away, too slow or refuses, DataError when what
        it says is no JSON or too long.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            request = urllib.request.Request(self.url + path, data, headers)
            wait = min(0.5 * 2**attempt, LONGEST_WAIT)
            try:
                with self.opener.open(request, timeout=self.timeout) as answer:
                    content = answer.read(limit + 1)
                return self._json(path, content, limit)
            except urllib.error.HTTPError as error:
                problem = self._refusal(path, error)
                if error.code not in RETRIED:
                    raise problem from error
                with contextlib.suppress(TypeError, ValueError):
                    wait = min(max(0.0, float(error.headers["Retry-After"])), LONGEST_WAIT)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                slow = isinstance(reason, TimeoutError)
                problem = EnvironmentProblem(
                    f"The teacher's server {self.url} "
                    + (
                        f"did not answer within {self.timeout:g} s"
                        if slow
                        else f"cannot be reached: {reason or type(reason).__name__}"
                    )
                    + f" ({attempt + 1} attempts). Start it, or say where it is."
                )
            if attempt == self.retries:
                raise problem
            log.debug("%s; again in %.1f s", problem, wait)
            time.sleep(wait)
        raise AssertionError("unreachable")

    def _json(self, path: str, content: bytes, limit: int) -> Any:
        if len(content) > limit:
            raise DataError(f"{self.url}{path} answered with more than {limit:,} bytes.")
        try:
            return json.loads(content)
        except ValueError as error:
            raise DataError(
                f"{self.url}{path} did not answer with JSON: {content[:80]!r}"
            ) from error

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> EnvironmentProblem:
        with contextlib.suppress(OSError, http.client.HTTPException):
            text = error.read(2000).decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                content = json.loads(text)
                text = (content.get("error") or content)["message"]
            hints = {401: f" Set {KEY}.", 403: f" Set {KEY}.", 404: " Is the model's name right?"}
            hint = hints.get(error.code, "")
            if "logprobs" in text and "max" in text.lower():
                hint = " Start it with as many: vllm serve MODEL --max-logprobs K."
            return EnvironmentProblem(
                f"The teacher's server {self.url}{path} refused ({error.code}): {text}{hint}"
            )
        return EnvironmentProblem(f"The teacher's server {self.url}{path} refused: {error.code}.")


class ServedTeacher:
    """The targets of rows from a server, ``at_once`` rows asked at the same time.

    Raises ConfigError for what a server cannot tell; EnvironmentProblem when it does not answer;
    DataError when its vocabulary is not the data's, or its answers are not what was asked for.
    """

    def __init__(
        self,
        url: str,
        examples: Examples,
        asked: Asked,
        *,
        model: str | None = None,
        timeout: float = 120.0,
        retries: int = 4,
        at_once: int = 8,
    ) -> None:
        if asked.sampled or asked.temperatures != (1.0,):
            raise ConfigError(
                "A served teacher tells its likeliest tokens at temperature 1 only: what the tail "
                "would be at another does not follow from them. Use temperature 1, or load the "
                "teacher directly."
            )
        asked.check(examples.vocab_size)
        self.server = Server(url, timeout=timeout, retries=retries)
        self.asked, self.vocab_size, self.at_once = asked, examples.vocab_size, at_once
        self.model, context = self._find(model)
        if context is not None and examples.length + 2 > context:
            raise DataError(
                f"{self.model} on {self.server.url} reads {context:,} tokens; rows of "
                f"{examples.length:,} need {examples.length + 2:,}. Start it with --max-model-len "
                f"{examples.length + 2}, or use shorter rows."
            )
        self._check_vocabulary(examples)
        self.identity: dict[str, Any] = {"served": self.model, "adapter": None}

    def targets(
        self, numbers: Sequence[int], inputs: Tensor, starts: Tensor | None = None
    ) -> SparseTargets:
        """As ``Teacher.targets``; a document that must not see those before it is asked alone."""
        shape = (*inputs.shape, self.asked.k)
        indices = np.empty(shape, dtype=np.int64)
        log_probs = np.empty(shape, dtype=np.float64)
        pieces = []
        for row in range(shape[0]):
            begins = [] if starts is None else (starts[row, 1:].nonzero()[:, 0] + 1).tolist()
            edges = [0, *begins, shape[1]]
            pieces += [(row, a, b) for a, b in itertools.pairwise(edges)]

        def fill(piece: tuple[int, int, int]) -> None:
            row, begin, end = piece
            ids = inputs[row, begin:end].tolist()
            indices[row, begin:end], log_probs[row, begin:end] = self._ask(ids)

        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                list(pool.map(fill, pieces))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        known = torch.from_numpy(log_probs)
        tail = torch.log1p(-known.exp().sum(-1).clamp(max=1.0))
        return SparseTargets(
            torch.from_numpy(indices).to(inputs.device),
            known.float().to(inputs.device),
            tail.float()[..., None].to(inputs.device),
            (1.0,),
        )

    def _ask(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens after each of ``ids``, and their log probabilities: [L, K] both."""
        k = self.asked.k
        prompt = [*ids, ids[-1]]  # which token it is has no part in the distribution before it
        body = {
            "model": self.model,
            "prompt": prompt,
            "prompt_logprobs": k,
            "max_tokens": 1,
            "temperature": 0,
            "return_token_ids": True,
        }
        limit = (1 << 20) + len(prompt) * (k + 2) * ENTRY_BYTES
        answer = self.server.ask("/v1/completions", body, limit)
        try:
            choice = answer["choices"][0]
            rows, echoed = choice["prompt_logprobs"], choice.get("prompt_token_ids")
        except (KeyError, IndexError, TypeError) as error:
            raise self._wrong(NO_LOGPROBS) from error
        if not isinstance(rows, list):
            raise self._wrong(NO_LOGPROBS)
        if len(rows) != len(prompt) or (echoed is not None and echoed != prompt):
            raise self._wrong(
                f"is about {len(rows)} tokens, not the {len(prompt)} that were asked about; does "
                "it add or cut tokens?"
            )
        found = [self._row(row, token) for row, token in zip(rows[1:], prompt[1:], strict=True)]
        index, value = (np.array(part) for part in zip(*found, strict=True))
        return index, value

    def _row(self, row: Any, token: int) -> tuple[list[int], list[float]]:
        k = self.asked.k
        try:
            values = {int(key): float(entry["logprob"]) for key, entry in row.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._wrong(f"holds {str(row)[:80]} where log probabilities should be") from error
        if token not in values:
            raise self._wrong(f"does not name token {token} at its place: it is shifted")
        if len(values) < min(k, self.vocab_size):
            raise self._wrong(f"has {len(values)} tokens a position, {k} were asked for")
        # The k likeliest, without the token itself where it is not one of them.
        best = sorted(values, key=values.__getitem__, reverse=True)[:k]
        logs = [values[i] for i in best]
        if not 0 <= min(best) <= max(best) < self.vocab_size:
            raise self._wrong(f"names token {max(best)}; the data has {self.vocab_size} of them")
        # What is no number, and what is none of a distribution at temperature 1.
        if any(math.isnan(v) or v > 0.01 for v in logs) or sum(map(math.exp, logs)) > 1.01:
            raise self._wrong("has numbers that are no log probabilities of one distribution")
        return best, [max(v, -1e4) for v in logs]

    def _find(self, model: str | None) -> tuple[str, int | None]:
        """The model's name and the positions it reads, where the server says so."""
        answer = self.server.ask("/v1/models")
        try:
            served = {entry["id"]: entry.get("max_model_len") for entry in answer["data"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise self._wrong("lists no models at /v1/models", "server") from error
        if (
            not served
            or (model is not None and model not in served)
            or (model is None and len(served) > 1)
        ):
            raise EnvironmentProblem(
                f"{self.server.url} serves {', '.join(served) or 'nothing'}"
                + (f", not {model}" if model else "")
                + ". Say which one is the teacher:\n  teacher.path=NAME (thimble teacher cache: "
                "--served-model NAME)"
            )
        name = model or next(iter(served))
        return name, served[name]

    def _check_vocabulary(self, examples: Examples) -> None:
        """The server must cut a text that needs every kind of token into the ids of the data."""
        text = PROBE.replace(END_OF_TEXT, "").replace("</s>", "")
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        try:
            ids = self.server.ask("/tokenize", body)["tokens"]
        except (EnvironmentProblem, KeyError, TypeError):
            log.warning(
                "%s does not say how it cuts text (/tokenize), so whether its vocabulary is that "
                "of %s is for you to know", self.server.url, examples.directory,
            )  # fmt: skip
            return
        if ids != examples.tokenizer.encode(text):
            raise DataError(
                f"{self.model} on {self.server.url} has another vocabulary than "
                f"{examples.directory}: the same text has other ids there. Tokenize the data with "
                "its tokenizer, or serve a teacher with the vocabulary of the data."
            )

    def _wrong(self, what: str, which: str = "answer") -> DataError:
        return DataError(f"The teacher's {which} ({self.model_or_url}) {what}.")

    @property
    def model_or_url(self) -> str:
        return f"{getattr(self, 'model', 'model unknown')} on {self.server.url}"
