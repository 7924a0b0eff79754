"""How a conversation is laid out as tokens, and which of them the model is to say itself.

What is the model's is the text of an answer and the token that ends it; everything a template adds
is not. A layout is a list of parts whose tokens are joined. A part ends wherever a label begins, so
the tokens before an answer are the same whether the answer is there or yet to be generated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from thimble.conversations.records import Conversation, Turn
from thimble.errors import ConfigError
from thimble.tokens.sentencepiece import SentencePieceTokenizer
from thimble.tokens.tokenizer import HuggingFaceTokenizer, Tokenizer

PLAIN = "The plain template serves always: --template plain (in a recipe dataset.template=plain)."


class Part(NamedTuple):
    """A text, in which no special token is looked for, or one special token by its id."""

    text: str = ""
    id: int | None = None
    labelled: bool = False


class Template(Protocol):
    """How a conversation is laid out.

    ``header``: how many tokens at the end of a prompt say that the answer begins; ``end``: the id
    that ends an answer.
    """

    header: int
    end: int

    def parts(self, conversation: Conversation) -> list[Part]: ...


def special_id(tokenizer: Tokenizer, role: str) -> int | None:
    """The id of "bos" or "unk" in a tokenizer, None where it has none."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        index = getattr(tokenizer.processor, f"{role}_id")()
        return None if index < 0 else index
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    token = tokenizer.config.get(f"{role}_token")
    if token is None and role == "unk":
        token = getattr(tokenizer.backend.model, "unk_token", None)
    return None if token is None else tokenizer.backend.token_to_id(token)


def template_of(name: str, tokenizer: Tokenizer, system_message: str) -> Template:
    """``plain``, or ``chat`` (the tokenizer's own). ConfigError when it has none that can serve."""
    return (PlainTemplate if name == "plain" else ChatTemplate)(tokenizer, system_message)


class PlainTemplate:
    """``[SYSTEM]``, ``[USER]`` and ``[ASSISTANT]``, each on a line of its own before its text.

    A conversation begins with the tokenizer's beginning-of-sequence token where it has one, and
    every answer ends with its end-of-text token. Of the single-turn form in the documents; further
    turns follow without another system message.
    """

    ANSWER = "[ASSISTANT]\n"

    def __init__(self, tokenizer: Tokenizer, system_message: str) -> None:
        self.system_message = system_message
        self.bos, self.end = special_id(tokenizer, "bos"), tokenizer.eot_id
        self.header = len(tokenizer.encode(self.ANSWER))

    def parts(self, conversation: Conversation) -> list[Part]:
        system = conversation.system.strip() or self.system_message
        before = f"[SYSTEM]\n{system}\n" if system else ""
        parts = [] if self.bos is None else [Part(id=self.bos)]
        for turn in conversation.turns:
            labelled = turn.weight > 0
            parts += [
                Part(f"{before}[USER]\n{turn.question}\n{self.ANSWER}"),
                Part(turn.answer, labelled=labelled),
                Part(id=self.end, labelled=labelled),
            ]
            before = ""
        return parts


class _Item(NamedTuple):
    """A piece of a layout: text of the template, or the content of a message by its number."""

    text: str
    content: int | None = None
    answer: bool = False


class ChatTemplate:
    """The Jinja template that comes with a tokenizer, as transformers renders it.

    The layout is found once for each number of turns, by rendering marks in place of the messages,
    turn by turn: what is rendered for the first turns must stay the beginning of what is rendered
    for more, or no token could be both an input and the answer it was. Special tokens are those of
    the template; their text inside a message stays text.
    """

    def __init__(self, tokenizer: Tokenizer, system_message: str) -> None:
        template = getattr(tokenizer, "config", {}).get("chat_template")
        if isinstance(template, list):  # several, each with a name
            template = {each["name"]: each["template"] for each in template}.get("default")
        if not isinstance(tokenizer, HuggingFaceTokenizer) or not template:
            raise ConfigError(f"This tokenizer has no chat template. {PLAIN}")
        self.template, self.system_message = template, system_message
        self.end = tokenizer.eot_id
        added = tokenizer.backend.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}
        names = sorted(map(re.escape, self.special), key=len, reverse=True)
        self.pattern = re.compile("|".join(names) or r"(?!)")
        self.names: dict[str, Any] = {
            name: token
            for name, token in tokenizer.config.items()
            if name.endswith("_token") and isinstance(token, str)
        }
        self.layout = functools.lru_cache(maxsize=256)(self._layout)
        self.layout(2, bool(system_message))  # a template that cannot serve is refused at once
        asked = [{"role": "user", "content": "x"}]
        header = self._render(asked, True).removeprefix(self._render(asked, False))
        self.header = len(tokenizer.encode(header))
        try:
            last = self.parts(Conversation((Turn("Why?", "So."),)))[-1]
        except ValueError as error:
            raise ConfigError(
                f"The tokenizer's chat template cannot serve: {error}. {PLAIN}"
            ) from error
        self.end = self.end if last.id is None else last.id  # not always the end of a text

    def _render(self, messages: Sequence[dict[str, str]], answer_follows: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                add_generation_prompt=answer_follows,
                **self.names,
            )
        except TemplateError as error:
            raise ConfigError(
                f"The tokenizer's chat template refuses: {error}. If it knows no system message, "
                'leave that out: --system-message "" (in a recipe dataset.system_message=""). '
                f"{PLAIN}"
            ) from error
        return rendered[0][0]  # of texts and places, those of the one conversation

    def _layout(self, turns: int, system: bool) -> tuple[tuple[_Item, ...], str]:
        """The items up to the end of the last answer, and the text that the template adds then."""
        messages = _messages([_mark(i) for i in range(2 * turns + system)], system)
        items: list[_Item] = []
        done = ""
        for count in range(1 + system, len(messages), 2):
            asked = self._render(messages[:count], True)
            told = self._render(messages[: count + 1], False)
            answer, found, tail = told[len(asked) :].partition(_mark(count))
            if not (asked.startswith(done) and told.startswith(asked) and found) or answer.strip():
                raise ConfigError(
                    "The tokenizer's chat template rewrites earlier turns, or adds to an answer "
                    f"what the model was not asked for, so no exact labels exist for it. {PLAIN}"
                )
            for number, piece in enumerate(_MARKS.split(asked[len(done) :])):
                # Of what is split at a pattern with one group, every second piece is that group.
                items.append(_Item("", int(piece)) if number % 2 else _Item(piece))
            items += [_Item(answer, answer=True), _Item("", count, answer=True)]
            end = re.match(rf"\s*(?:{self.pattern.pattern})", tail)
            if end:
                items.append(_Item(end[0], answer=True))
            done = told[: len(told) - len(tail) + (end.end() if end else 0)]
        return tuple(items), told[len(done) :]

    def parts(self, conversation: Conversation) -> list[Part]:
        system = conversation.system.strip() or self.system_message
        contents = [system] if system else []
        for turn in conversation.turns:
            contents += [turn.question, turn.answer]
        items, rest = self.layout(len(conversation.turns), bool(system))
        real = self._render(_messages(contents, bool(system)), False)
        for form in (str, str.strip):
            shown = [form(content) for content in contents]
            whole = "".join(shown[i.content] if i.content is not None else i.text for i in items)
            if whole + rest == real:
                break
        else:
            raise ValueError("the chat template changes the text of turns")
        parts: list[Part] = []
        weights = iter([turn.weight for turn in conversation.turns])
        text, labelled, in_answer = "", False, False
        for item in items:
            if item.answer != in_answer:
                parts.append(Part(text, labelled=labelled))
                text, in_answer = "", item.answer
                labelled = in_answer and next(weights) > 0
            if item.content is not None:
                text += shown[item.content]
                continue
            place = 0
            for match in self.pattern.finditer(item.text):
                text += item.text[place : match.start()]
                parts.append(Part(text, labelled=labelled))
                parts.append(Part(id=self.special[match[0]], labelled=labelled))
                text, place = "", match.end()
            text += item.text[place:]
        parts.append(Part(text, labelled=labelled))
        parts = [part for part in parts if part.text or part.id is not None]
        if parts[-1].id is None:  # a template that ends nothing: our own end, or none is learned
            parts.append(Part(id=self.end, labelled=labelled))
        return parts


_MARKS = re.compile("\ue000([0-9]+)\ue001")


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _messages(contents: Sequence[str], system: bool) -> list[dict[str, str]]:
    roles = [*(["system"] if system else []), *(["user", "assistant"] * len(contents))]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def encode(
    conversations: Sequence[Sequence[Part]], tokenizer: Tokenizer
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and labels (bool) of each conversation, both of its length in tokens."""
    texts = [part.text for parts in conversations for part in parts if part.id is None]
    flat, lengths = tokenizer.pack(texts)
    ends = np.cumsum(lengths)
    pieces = iter([flat[end - n : end - 1] for end, n in zip(ends, lengths, strict=True)])
    encoded = []
    for parts in conversations:
        ids = [next(pieces) if p.id is None else np.array([p.id], flat.dtype) for p in parts]
        labels = [np.full(len(i), p.labelled) for i, p in zip(ids, parts, strict=True)]
        encoded.append((np.concatenate(ids), np.concatenate(labels)))
    return encoded


def prompt_ids(
    template: Template,
    tokenizer: Tokenizer,
    question: str,
    *,
    turns: Sequence[Turn] = (),
    system: str = "",
) -> list[int]:
    """The tokens after which the answer to ``question`` begins, as in training."""
    asked = Conversation((*(replace(t, weight=0.0) for t in turns), Turn(question, "x")), system)
    parts = template.parts(asked)
    while parts[-1].labelled:
        parts.pop()
    return encode([parts], tokenizer)[0][0].tolist()


class Fitted(NamedTuple):
    """An example within its length, and what that took."""

    ids: np.ndarray
    labels: np.ndarray
    prompt_cut: bool = False
    answer_shortened: bool = False
    answers_dropped: int = 0


def fit(ids: np.ndarray, labels: np.ndarray, limit: int, header: int, first: int) -> Fitted | None:
    """Cut an example to ``limit`` tokens; None when no answer would be left.

    The first prompt gives way to its answer down to half of the limit, losing its beginning (but
    not its ``first`` tokens, such as the beginning-of-sequence one); then the end is cut. A prompt
    whose half cannot even hold the ``header`` before the answer leaves nothing to learn from.
    """
    if len(ids) <= limit:
        return Fitted(ids, labels)
    begin = int(np.argmax(labels))
    answer = int(np.argmin(labels[begin:])) or len(labels) - begin
    room = max(limit - answer, limit // 2)
    if room < min(first + header, begin):
        return None
    drop = max(0, begin - room)
    if drop:
        ids = np.concatenate([ids[:first], ids[first + drop :]])
        labels = np.concatenate([labels[:first], labels[first + drop :]])
    begins = labels[1:] & ~labels[:-1]  # at i: an answer begins with token i + 1
    dropped = int(np.sum(begins[limit - 1 :]))
    shortened = len(ids) > limit and bool(labels[limit - 1] and labels[limit])
    ids, labels = ids[:limit], labels[:limit]
    last = len(labels) - int(np.argmax(labels[::-1]))  # nothing is learned after the last answer
    return Fitted(ids[:last], labels[:last], drop > 0, shortened, dropped)
