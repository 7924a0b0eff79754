"""Ids to text while they come, and where an answer in plain text ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from thimble.tokens.tokenizer import Tokenizer

LONGEST = 4  # bytes of a character, so as many tokens at most


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, before: Sequence[int]) -> Iterator[str]:
    """The text of ``ids`` that follow ``before`` as pieces, each of complete characters.

    A piece is what a token adds to the text of its neighbours: alone, a token of a SentencePiece
    model would lose the space it begins with.
    """
    known = list(before)[-LONGEST:]  # its text has been given out
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        piece = _added(tokenizer, known, waiting)
        # A character can span several byte tokens, after a token that is only the space before it;
        # wait until it is whole.
        if not piece or (piece.endswith("\ufffd") and len(waiting) <= LONGEST):
            continue
        yield piece
        known, waiting = waiting, []
    if waiting and (piece := _added(tokenizer, known, waiting)):
        yield piece


def _added(tokenizer: Tokenizer, known: list[int], new: list[int]) -> str:
    return tokenizer.decode(known + new)[len(tokenizer.decode(known)) :]


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """Pieces up to the text ``stop``, without the space they begin with."""
    held = ""
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


def between(pieces: Iterable[str], lead: str, tail: str) -> Iterator[str]:
    """Pieces without the text ``lead`` they begin and the text ``tail`` they end with, if any."""
    held = ""
    begun = False
    for piece in pieces:
        held += piece
        if not begun:
            if len(held) < len(lead):
                continue
            held, begun = held.removeprefix(lead), True
        safe = len(held) - len(tail)  # what could be the tail stays back
        if safe > 0:
            yield held[:safe]
            held = held[safe:]
    rest = (held if begun else held.removeprefix(lead)).removesuffix(tail)
    if rest:
        yield rest
