"""How a model is asked: as the documents it was trained on, or by its conversations' template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from thimble.artifacts import read_json
from thimble.config.section import Section
from thimble.console import log
from thimble.conversations.records import Conversation, Turn
from thimble.conversations.template import prompt_ids, special_id, template_of
from thimble.errors import ConfigError, DataError
from thimble.generation.text import between, until
from thimble.tokens.tokenizer import Tokenizer

CONVERSATION = "conversation.json"
HISTORY = "\n"  # between turns, as in the corpus

Message = dict[str, str]


class Layout(Protocol):
    """How messages become a prompt and what follows becomes an answer.

    ``begin``: the id that stands before a text; ``stop``: those that end one; ``form``: of the
    cross-entropy trained with; ``max_tokens``, ``temperature``: of an answer, where nothing is
    said.
    """

    begin: int
    stop: frozenset[int]
    form: str
    max_tokens: int
    temperature: float

    def ask(self, messages: Sequence[Message], context: int, answer: int) -> tuple[list[int], int]:
        """The prompt, and how many tokens of an answer of ``answer`` fit behind it; see
        ``fitting`` for what does not fit into ``context`` tokens."""
        ...

    def answer(self, pieces: Iterable[str]) -> Iterator[str]:
        """The answer out of the text that follows the prompt."""
        ...


class Document:
    """Questions and answers as the plain document they are in a corpus."""

    form = "softmax"
    max_tokens, temperature = 128, 0.8

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.begin = tokenizer.eot_id  # every document of a corpus begins after one
        self.stop = frozenset({tokenizer.eot_id})

    def ask(self, messages: Sequence[Message], context: int, answer: int) -> tuple[list[int], int]:
        def without(oldest: int) -> list[int]:
            return [self.begin, *self.tokenizer.encode(question(messages[oldest:]))]

        return fitting(without, len(messages) - 1, context, answer, first=1), answer

    def answer(self, pieces: Iterable[str]) -> Iterator[str]:
        return until(pieces, "\nQuestion:")


def question(messages: Sequence[Message]) -> str:
    """A conversation as the plain document it is in the corpus, up to the answer to come."""
    names = {"user": "Question: ", "assistant": "Answer: "}
    turns = [names.get(turn["role"], "") + turn["content"].strip() for turn in messages]
    return HISTORY.join([*turns, "Answer:"])


class Instructions(Section):
    """``conversation.json`` of a checkpoint: how the conversations were laid out it learned from.

    ``seq_len``: tokens of the longest example; ``form``: of the cross-entropy.
    """

    template: str
    system_message: str
    end_id: int
    pad_id: int
    seq_len: int
    form: str


class Dialogue:
    """Turns in the template of the instruction data, answered greedily as in the documents."""

    temperature = 0.0

    def __init__(self, tokenizer: Tokenizer, given: Instructions) -> None:
        self.tokenizer, self.given, self.form = tokenizer, given, given.form
        self.template = template_of(given.template, tokenizer, given.system_message)
        bos = special_id(tokenizer, "bos")
        self.begin = tokenizer.eot_id if bos is None else bos
        self.stop = frozenset({given.end_id, tokenizer.eot_id})
        self.max_tokens = max(given.seq_len // 2, 1)
        # White space that a chat template has the model say around an answer; none in plain.
        parts = self.template.parts(Conversation((Turn("x", "y"),)))
        said = "".join(part.text for part in parts if part.labelled)
        self.lead, _, self.tail = said.partition("y")

    def ask(self, messages: Sequence[Message], context: int, answer: int) -> tuple[list[int], int]:
        system, turns = _turns(messages)
        template = self.template
        if system is not None:
            template = template_of(self.given.template, self.tokenizer, system)
        context = min(context, self.given.seq_len)

        def without(oldest: int) -> list[int]:
            try:
                return prompt_ids(
                    template, self.tokenizer, turns[-1].question, turns=turns[oldest:-1]
                )
            except ValueError as error:
                raise ConfigError(f"These messages cannot be laid out: {error}.") from error

        first = int(without(len(turns) - 1)[0] == self.begin)
        if context // 2 <= first + template.header:
            raise ConfigError(
                f"A context of {context} tokens has no room for a question. Give it more:\n"
                f"  --overrides dataset.seq_len={4 * context}"
            )
        ids = fitting(without, len(turns) - 1, context, answer, first)
        # Beyond its context the model would have to forget the question.
        return ids, min(answer, context - len(ids))

    def answer(self, pieces: Iterable[str]) -> Iterator[str]:
        return between(pieces, self.lead, self.tail)


def _turns(messages: Sequence[Message]) -> tuple[str | None, list[Turn]]:
    """The system message, None where there is none, and the turns; the last has no answer yet."""
    told = list(messages)
    system = told.pop(0)["content"] if told and told[0]["role"] == "system" else None
    if [turn["role"] for turn in told] != ["user", *["assistant", "user"] * (len(told) // 2)]:
        raise ConfigError(
            "The messages must alternate between user and assistant, after at most one of system."
        )
    answers = [turn["content"] for turn in told[1::2]] + [""]
    return system, [Turn(q["content"], a) for q, a in zip(told[::2], answers, strict=True)]


def fitting(
    without: Callable[[int], list[int]], most: int, context: int, answer: int, first: int = 0
) -> list[int]:
    """The prompt ``without`` as many of its oldest messages as the answer needs room.

    ``most`` messages at most go, as long as ``answer`` tokens, or half of the ``context``, are not
    free. If not even a quarter is then, the beginning goes but for the ``first`` tokens. Both are
    said.
    """
    room = context - min(answer, context // 2)
    dropped = 0
    ids = without(0)
    while len(ids) > room and dropped < most:
        dropped += 1
        ids = without(dropped)
    if dropped:
        log.warning(
            "The conversation does not fit into %d tokens: the oldest %d of %d turns are left out.",
            *(room, dropped, most + 1),
        )
    room = context - min(answer, context // 4)
    if (over := len(ids) - room) > 0:
        log.warning(
            "The prompt has %d tokens, and there is room for %d: its beginning is left out.",
            *(len(ids), room),
        )
        ids = ids[:first] + ids[first + over :]
    return ids


def layout_of(directory: Path, tokenizer: Tokenizer, seq_len: int | None = None) -> Layout:
    """How the model of a checkpoint is asked. ``seq_len``: another length than it was trained with.

    Raises DataError when its ``conversation.json`` is not one.
    """
    file = directory / CONVERSATION
    if not file.is_file():
        return Document(tokenizer)
    try:
        given = Instructions.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    if seq_len is not None:
        if seq_len > given.seq_len:
            log.warning(
                "Positions beyond %d are new to this model: it was trained with no longer text.",
                given.seq_len,
            )
        given = given.model_copy(update={"seq_len": seq_len})
    return Dialogue(tokenizer, given)
