"""A tokenizer as the vocabulary of a GGUF file, where llama.cpp would give the same ids.

llama.cpp knows the splitting of text before BPE only by names of its own, so a tokenizer whose
splitting has no such name is refused: the file would load, and its ids would be others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thimble.errors import DataError
from thimble.tokens.sentencepiece import SentencePieceTokenizer
from thimble.tokens.tokenizer import CHAT_TEMPLATE, WORDS, HuggingFaceTokenizer, Tokenizer

# What llama.cpp splits by under the name llama-bpe: our WORDS with runs of any length.
UNCAPPED_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kinds of tokens, as in llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


# tokenizers' pre-tokenizers, and llama.cpp's name of the same.
PRE_TOKENIZERS: tuple[tuple[list[dict[str, Any]], str], ...] = (
    ([_split(WORDS), _byte_level(False)], "llama-bpe"),
    ([_split(UNCAPPED_WORDS), _byte_level(False)], "llama-bpe"),
    ([_byte_level(True)], "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _byte_level(True)], "smollm"),
)
WHOLE_WORDS_FIRST = {"llama-bpe"}  # a word that is a token is that token, whatever the merges say


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id with their kinds; ``pre`` and ``merges`` are of BPE, ``scores`` of
    SentencePiece."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    bos: int | None
    eos: int
    pad: int | None
    unknown: int | None
    chat_template: str
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        # Said, since otherwise the name of the splitting decides. Documents begin after bos here.
        writer.add_add_bos_token(self.bos is not None)
        writer.add_add_eos_token(False)
        writer.add_chat_template(self.chat_template)


def vocabulary_of(
    tokenizer: Tokenizer, size: int, native: Mapping[str, Any], where: Path
) -> Vocabulary:
    """The vocabulary of the checkpoint ``where`` for an embedding of ``size`` rows.

    ``native`` is its config.json, for what a document begins with. Raises DataError for a tokenizer
    that llama.cpp would not reproduce.
    """
    bos = native.get("bos_token_id", tokenizer.eot_id)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _from_sentencepiece(tokenizer, size, bos, where)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return _from_bpe(tokenizer, size, bos, where)


def _from_bpe(
    tokenizer: HuggingFaceTokenizer, size: int, bos: int | None, where: Path
) -> Vocabulary:
    layout = json.loads(tokenizer.backend.to_str())
    pre = _pre_tokenizer_name(layout, where)
    bpe = layout["model"]
    vocabulary = tokenizer.vocabulary()
    added = {token["id"]: token for token in layout["added_tokens"]}
    if bool(bpe.get("ignore_merges")) != (pre in WHOLE_WORDS_FIRST):
        split = tokenizer.backend.model.tokenize
        for word, index in vocabulary.items():
            if index not in added and len(split(word)) != 1:
                raise DataError(
                    f"The tokenizer of {where} and llama.cpp's {pre} disagree about the word "
                    f"{word!r}: a token in one, several in the other. llama.cpp has no name for "
                    "this tokenizer, so it cannot be exported as GGUF."
                )
    tokens, kinds = _fill(vocabulary, size)
    for index, token in added.items():
        kinds[index] = CONTROL if token["special"] else USER_DEFINED
    unknown = tokenizer.config.get("unk_token")
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        bos=bos,
        eos=tokenizer.eot_id,
        pad=tokenizer.pad_id,
        unknown=None if unknown is None else tokenizer.backend.token_to_id(unknown),
        chat_template=str(tokenizer.config["chat_template"]),
        merges=[" ".join(m) if isinstance(m, list) else m for m in bpe["merges"]],
    )


def _pre_tokenizer_name(layout: dict[str, Any], where: Path) -> str:
    """llama.cpp's name for what a ``tokenizer.json`` does before BPE."""
    bpe, splitter = layout["model"], layout["pre_tokenizer"] or {}
    parts = [
        {key: value for key, value in part.items() if key != "trim_offsets"}
        for part in splitter.get("pretokenizers", [splitter])
    ]
    plain = (
        bpe["type"] == "BPE"
        and layout["normalizer"] is None
        and not bpe.get("byte_fallback")
        and not bpe.get("continuing_subword_prefix")
        and not bpe.get("end_of_word_suffix")
    )
    for known, name in PRE_TOKENIZERS:
        if plain and parts == known:
            return name
    kinds = ", ".join(str(part.get("type")) for part in parts) or "nothing"
    if splitter.get("pretokenizers", splitter) and plain:
        reason = f"its pre-tokenizer ({kinds}) is none whose llama.cpp name is known here"
    else:
        reason = "it is not a byte-level BPE without a normalizer"
    raise DataError(
        f"llama.cpp would not reproduce the tokenizer of {where}: {reason}. Export the model with "
        "thimble export transformers instead, or train it with a tokenizer of thimble tokens build."
    )


def _from_sentencepiece(
    tokenizer: SentencePieceTokenizer, size: int, bos: int | None, where: Path
) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2 as schema

    proto = schema.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    amiss = {
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it has no tokens for single bytes": not trainer.byte_fallback,
        "it normalizes text": bool(normalizer.precompiled_charsmap),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it marks spaces at the end of words": trainer.treat_whitespace_as_suffix,
        "it does not mark spaces": not normalizer.escape_whitespaces,
    }
    if any(amiss.values()):
        reasons = ", ".join(reason for reason, wrong in amiss.items() if wrong)
        raise DataError(
            f"llama.cpp would not reproduce the SentencePiece model of {where}: {reasons}. "
            "Export the model with thimble export transformers instead."
        )
    tokens, kinds = _fill(tokenizer.vocabulary(), size)
    scores = [piece.score for piece in proto.pieces]
    for index, piece in enumerate(proto.pieces):
        kinds[index] = piece.type  # the same numbers
        if piece.type == USER_DEFINED:
            tokens[index] = piece.piece.replace("▁", " ")
    unknown, pad = tokenizer.processor.unk_id(), tokenizer.pad_id
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds=kinds,
        bos=bos,
        eos=tokenizer.eot_id,
        pad=pad,
        unknown=unknown if unknown >= 0 else None,
        chat_template=CHAT_TEMPLATE,
        scores=scores + [0.0] * (size - len(scores)),
        space_prefix=normalizer.add_dummy_prefix,
    )


def _fill(vocabulary: Mapping[str, int], size: int) -> tuple[list[str], list[int]]:
    """Tokens and kinds by id; an id that means nothing gets a name that no token has."""
    tokens = {index: token for token, index in vocabulary.items()}
    mark = "<|unused-{}|>"
    while any(mark.format(index) in vocabulary for index in range(size)):
        mark = f"<{mark}>"
    kinds = [NORMAL if index in tokens else UNUSED for index in range(size)]
    return [tokens.get(index, mark.format(index)) for index in range(size)], kinds
