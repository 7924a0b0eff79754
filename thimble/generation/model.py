"""A checkpoint made to answer: ``thimble.load(path).generate("...")``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import torch

from thimble.console import log
from thimble.errors import ConfigError, DataError
from thimble.generation.layouts import Dialogue, Document, Layout, Message, fitting, layout_of
from thimble.generation.sampling import check_options, generate_ids
from thimble.generation.text import stream_text
from thimble.generation.trace import Names, Token
from thimble.models import interop
from thimble.models.recursive import RecursiveLM, position_table
from thimble.models.retention import document_starts
from thimble.objectives.linear_cross_entropy import token_losses, token_scores
from thimble.tokens.tokenizer import load_tokenizer
from thimble.training import checkpoint, devices

if TYPE_CHECKING:
    from thimble.generation.sampling import Network
    from thimble.tokens.tokenizer import Tokenizer


PUZZLE = "puzzle.json"


class Options(TypedDict, total=False):
    """How a text is generated.

    ``max_tokens`` (default: 128; after a conversation half of the sequence length), ``temperature``
    (0.8; after a conversation 0, always the likeliest token), ``top_k`` (50; 0: all), ``top_p``
    (1), ``seed`` (1). ``steps``, for recursive models: supervision steps, in place of as many as
    the halting head asks for. ``stream`` gets the text piece by piece, ``watch`` a
    ``thimble.generation.trace.Token`` for each token, the one that ends the text included.
    """

    max_tokens: int | None
    temperature: float | None
    top_k: int
    top_p: float
    seed: int
    steps: int | None
    stream: Callable[[str], object] | None
    watch: Callable[[Token], object] | None


def load(path: str | Path, device: str = "auto", *, seq_len: int | None = None) -> Model:
    """Load a checkpoint of ours or of transformers (llama, mistral, hrm_text), or a run's best.

    ``seq_len``: longest conversation, in place of the one in training (beyond it positions are new
    to the model). Raises DataError when the checkpoint is incomplete, damaged, of another
    architecture, or pickled, ConfigError when it holds a model of puzzles.
    """
    directory = checkpoint.resolve(path)
    where = devices.resolve_device(device)
    if (directory / PUZZLE).is_file() or not interop.read_config(directory).causal:
        raise ConfigError(
            f"{directory} holds a model of puzzles, which has no words. Let it solve some:\n"
            f"  thimble evaluate {path}"
        )
    network = interop.load_model(directory, where)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > network.config.vocab_size:
        raise DataError(
            f"The tokenizer in {directory} has {tokenizer.vocab_size:,} ids, the model only "
            f"{network.config.vocab_size:,}: they do not belong together."
        )
    layout = layout_of(directory, tokenizer, seq_len)
    if seq_len is not None:
        _lengthen(network, layout, seq_len)
    return Model(directory, network, tokenizer, where, layout)


def _lengthen(network: Network, layout: Layout, seq_len: int) -> None:
    """Give a recursive model positions for conversations of ``seq_len`` tokens."""
    if not isinstance(layout, Dialogue) or not isinstance(network, RecursiveLM):
        raise ConfigError("dataset.seq_len is of models of conversations; this one has none.")
    config = network.config
    if seq_len > config.max_position_embeddings:
        network.config = config.model_copy(update={"max_position_embeddings": seq_len})
        if config.position_embedding == "learned":
            raise ConfigError(
                f"The model has learned {config.max_position_embeddings} positions and knows no "
                f"others. Use:\n  dataset.seq_len={config.max_position_embeddings}"
            )
        table = position_table(config, seq_len)
        network.rope_2sc = table.to(network.rope_2sc.device)


class Model:
    """A language model with its tokenizer, in float32."""

    def __init__(
        self,
        path: Path,
        network: Network,
        tokenizer: Tokenizer,
        device: torch.device,
        layout: Layout | None = None,
    ) -> None:
        self.path, self.network, self.tokenizer, self.device = path, network, tokenizer, device
        self.config = network.config
        self.layout = layout or Document(tokenizer)

    @torch.inference_mode()
    def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each target in nats: inputs [B, T], targets [B, T] (-100 ignored) -> [B, T]."""
        hidden = self._hidden(inputs)
        return token_losses(hidden, self.network.head.weight, targets.to(self.device))

    @torch.inference_mode()
    def scores(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """``nll`` and, beside it, whether the target is in the top 1 and the top 5: [B, T, 3]."""
        hidden = self._hidden(inputs)
        return token_scores(hidden, self.network.head.weight, targets.to(self.device))

    def _hidden(self, inputs: torch.Tensor) -> torch.Tensor:
        ids = inputs.to(self.device)
        starts = document_starts(self.config, ids, self.tokenizer.eot_id)
        return self.network.hidden(ids, starts_bt=starts)

    def generate(
        self,
        prompt: str | None = None,
        message: str | None = None,
        *,
        system_message: str | None = None,
        **options: Unpack[Options],
    ) -> str:
        """Continue ``prompt``, or answer ``message`` as a question; one seed gives one text.

        Returns what was generated, without the prompt. See ``Options``, and ``chat`` for messages.
        """
        if (prompt is None) == (message is None):
            raise ConfigError("Give either a prompt to continue or a message to answer.")
        if message is not None:
            return self.chat(
                [{"role": "user", "content": message}], system_message=system_message, **options
            )
        if system_message is not None:
            raise ConfigError("A prompt is continued as it stands, without a system message.")
        ids = [self.layout.begin, *self.tokenizer.encode(prompt or "")]
        ids = fitting(lambda _: ids, 0, self.config.max_position_embeddings, answer=0)
        return self._text(ids, whole=True, **options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        system_message: str | None = None,
        **options: Unpack[Options],
    ) -> str:
        """The assistant's next turn after ``messages`` ({"role": user|assistant, "content"}).

        Earlier turns that no longer fit into the context are left out, oldest first, and so is the
        beginning of a question that is too long by itself; a warning says so. A model of
        conversations is asked by the template it was trained with and its system message, or
        ``system_message`` ("": none); its answer ends with the context at the latest.
        """
        if not messages or messages[-1].get("role") != "user":
            raise ConfigError("The last message must be the user's.")
        if system_message is not None:
            if not isinstance(self.layout, Dialogue):
                raise ConfigError("This model learned from plain text, without system messages.")
            messages = [{"role": "system", "content": system_message}, *messages]
        asked = options.get("max_tokens")
        wanted = self.layout.max_tokens if asked is None else asked
        ids, longest = self.layout.ask(messages, self.config.max_position_embeddings, wanted)
        if asked and longest < asked:
            log.warning("The context has room for %d tokens of an answer.", longest)
        limited: Options = {**options, "max_tokens": longest}
        return self._text(ids, whole=False, **limited)

    def _text(
        self,
        ids: list[int],
        whole: bool,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 1,
        steps: int | None = None,
        stream: Callable[[str], object] | None = None,
        watch: Callable[[Token], object] | None = None,
    ) -> str:
        """What follows the prompt ``ids``: ``whole``, or of it the answer."""
        layout = self.layout
        max_tokens = layout.max_tokens if max_tokens is None else max_tokens
        temperature = layout.temperature if temperature is None else temperature
        check_options(temperature, top_k, top_p, max_tokens)
        self._check_steps(steps)
        names = Names(self.tokenizer) if watch else None

        def watched(logits: torch.Tensor, chosen: int, thought: int | None) -> None:
            assert watch is not None
            assert names is not None
            watch(names.token(logits, chosen, thought, layout.form))

        generated = generate_ids(
            self.network,
            ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=layout.stop,
            form=layout.form,
            steps=steps,
            watch=watched if watch else None,
        )
        # A text goes on within its line; an answer is encoded by itself, as in training.
        pieces = stream_text(generated, self.tokenizer, ids if whole else [])
        parts = []
        for piece in pieces if whole else layout.answer(pieces):
            if stream:
                stream(piece)
            parts.append(piece)
        return "".join(parts)

    def _check_steps(self, steps: int | None) -> None:
        if steps is None:
            return
        if not isinstance(self.network, RecursiveLM):
            raise ConfigError("--steps is of recursive models; the stack of this one runs once.")
        if steps < 1:
            raise ConfigError(f"--steps {steps} leaves nothing to answer from.")
        if steps > self.config.halt_max_steps:
            log.warning("This model was trained with %d steps at most.", self.config.halt_max_steps)
