"""A checkpoint made to answer: ``thimble.load(path).generate("...")``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from thimble.errors import ConfigError, DataError
from thimble.generation.sampling import check_options, generate_ids
from thimble.models import interop
from thimble.objectives.linear_cross_entropy import token_losses, token_scores
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import checkpoint, devices

if TYPE_CHECKING:
    from thimble.models.causal_lm import CausalLM
    from thimble.tokens.tokenizer import Tokenizer

Message = dict[str, str]
HISTORY = "\n"  # between turns, as in the corpus


def load(path: str | Path, device: str = "auto") -> Model:
    """Load a checkpoint of ours or of transformers (llama, mistral), or a run's best checkpoint.

    Raises DataError when it is incomplete, damaged, of another architecture, or pickled.
    """
    directory = checkpoint.resolve(path)
    where = devices.resolve_device(device)
    network = interop.load_model(directory, where)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > network.config.vocab_size:
        raise DataError(
            f"The tokenizer in {directory} has {tokenizer.vocab_size:,} ids, the model only "
            f"{network.config.vocab_size:,}: they do not belong together."
        )
    return Model(directory, network, tokenizer, where)


class Model:
    """A language model with its tokenizer, in float32."""

    def __init__(
        self, path: Path, network: CausalLM, tokenizer: Tokenizer, device: torch.device
    ) -> None:
        self.path, self.network, self.tokenizer, self.device = path, network, tokenizer, device
        self.config = network.config

    @torch.inference_mode()
    def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each target in nats: inputs [B, T], targets [B, T] (-100 ignored) -> [B, T]."""
        hidden = self.network.hidden(inputs.to(self.device))
        return token_losses(hidden, self.network.head.weight, targets.to(self.device))

    @torch.inference_mode()
    def scores(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``nll`` and, beside it, whether the target is in the top 1 and the top 5: [B, T, 3]."""
        hidden = self.network.hidden(inputs.to(self.device))
        return token_scores(hidden, self.network.head.weight, targets.to(self.device))

    def generate(
        self,
        prompt: str | None = None,
        message: str | None = None,
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 1,
        stream: Callable[[str], object] | None = None,
    ) -> str:
        """Continue ``prompt``, or answer ``message`` as a question; one seed gives one text.

        Returns what was generated, without the prompt. ``stream`` gets it piece by piece.
        """
        if (prompt is None) == (message is None):
            raise ConfigError("Give either a prompt to continue or a message to answer.")
        if message is not None:
            prompt = question([{"role": "user", "content": message}])
        pieces = self._pieces(prompt or "", max_tokens, temperature, top_k, top_p, seed)
        return _collect(pieces if message is None else _one_answer(pieces), stream)

    def chat(
        self,
        messages: list[Message],
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 1,
        stream: Callable[[str], object] | None = None,
    ) -> str:
        """The assistant's next turn after ``messages`` ({"role": user|assistant, "content"}).

        Earlier turns that no longer fit into the context are left out, oldest first.
        """
        if not messages or messages[-1].get("role") != "user":
            raise ConfigError("The last message must be the user's.")
        room = self.config.max_position_embeddings - min(
            max_tokens, self.config.max_position_embeddings // 2
        )
        kept = list(messages)
        while len(kept) > 1 and len(self.tokenizer.encode(question(kept))) > room:
            kept = kept[1:]
        pieces = self._pieces(question(kept), max_tokens, temperature, top_k, top_p, seed)
        return _collect(_one_answer(pieces), stream)

    def _pieces(
        self,
        text: str,
        max_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> Iterator[str]:
        """The continuation as pieces of text, each complete characters."""
        check_options(temperature, top_k, top_p, max_tokens)
        eot = self.tokenizer.eot_id
        ids = generate_ids(
            self.network,
            # Every document of the corpus begins after an end-of-text token.
            [eot, *self.tokenizer.encode(text)],
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=frozenset({eot}),
        )
        waiting: list[int] = []
        for token in ids:
            waiting.append(token)
            piece = self.tokenizer.decode(waiting)
            # A character can span several byte tokens; wait until it is whole (at most four bytes).
            if piece.endswith("\ufffd") and len(waiting) < 4:
                continue
            waiting = []
            yield piece
        if waiting:
            yield self.tokenizer.decode(waiting)


def question(messages: list[Message]) -> str:
    """A conversation as the plain document it is in the corpus, up to the answer to come."""
    names = {"user": "Question: ", "assistant": "Answer: "}
    turns = [names.get(turn["role"], "") + turn["content"].strip() for turn in messages]
    return HISTORY.join([*turns, "Answer:"])


def _one_answer(pieces: Iterator[str]) -> Iterator[str]:
    """Up to where the model would begin the next question itself."""
    stop, held = "\nQuestion:", ""
    first = True
    for piece in pieces:
        held += piece.lstrip() if first else piece
        first = first and not held
        if stop in held:
            yield held.split(stop)[0]
            return
        # Hold back what could be the beginning of the stop text.
        safe = len(held)
        for size in range(min(len(stop), len(held)), 0, -1):
            if held.endswith(stop[:size]):
                safe -= size
                break
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _collect(pieces: Iterator[str], stream: Callable[[str], object] | None) -> str:
    parts = []
    for piece in pieces:
        if stream:
            stream(piece)
        parts.append(piece)
    return "".join(parts)
