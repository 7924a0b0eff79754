"""SentencePiece models, encoded by ``sentencepiece`` itself, so that the ids are the original ones.

``save`` also writes a ``tokenizer.json`` for transformers, built here with ``tokenizers``. It is
only kept when it gives the same ids as ``sentencepiece`` on texts chosen to be hard.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thimble import artifacts
from thimble.console import log
from thimble.errors import DataError
from thimble.tokens.tokenizer import CHAT_TEMPLATE, PROBE, fingerprint_of, pack_lists

MARK = "sentencepiece_ids"  # in tokenizer_config.json: tokenizer.model is what made the shards

HARD_TEXTS = (
    PROBE,
    "",
    " ",
    "  ",
    "   a",
    "a   ",
    "\n",
    "\n\n  \n",
    "Hello\n  indented",
    "Hello  world   of    spaces" + " " * 40 + "end",
    "\tif (x) {\n\t\treturn  0;\t/* done */\n\t}\n",
    "<s></s><unk><pad> <0x0A> ▁ ▁▁x",
    "don't Isn’t 3.14159 1,000,000 0xdeadbeef ffff:00:1f.2",
    "Ünïcödé ﬁ ① Å e\u0301 \u00a0nbsp\u2003em \u200bzero \ufeffbom",
    "日本語テキスト 한국어 العربية हिन्दी русский",
    "👩‍👩‍👧‍👦 🏳️‍🌈 𝕳𝖊𝖑𝖑𝖔 \U0010fffd",
    "\x00\x01\x7f\x85\r\n\x0b\x0c",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabababababababab" * 3,
)


class SentencePieceTokenizer:
    """A ``.model`` file; ``where`` names it in messages."""

    def __init__(self, model: bytes, where: object) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = model
        try:
            if not model:
                raise ValueError("it is empty")  # which the library would take for a model
            self.processor: Any = SentencePieceProcessor(model_proto=model)
        except Exception as error:  # RuntimeError, or what the protobuf parser raises
            raise DataError(f"{where} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self.processor.vocab_size()
        self.eot_id: int = self.processor.eos_id()
        self.pad_id: int | None = None if self.processor.pad_id() < 0 else self.processor.pad_id()
        if self.eot_id < 0:
            raise DataError(
                f"The SentencePiece model {where} has no end-of-sentence token to put between "
                "documents. Train it with one (--eos_id)."
            )

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self)

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.processor.encode(list(texts), num_threads=1)

    def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return pack_lists(self.encode_batch(texts), self)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(map(int, ids)))

    def vocabulary(self) -> dict[str, int]:
        return {self.processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.model, and tokenizer.json where that gives the same ids."""
        directory = Path(directory)
        with artifacts.atomic_file(directory / "tokenizer.model") as temporary:
            temporary.write_bytes(self.model)
        config = {MARK: True, "chat_template": CHAT_TEMPLATE}
        for role in ("bos", "eos", "pad", "unk"):
            index = getattr(self.processor, f"{role}_id")()
            if index >= 0:
                config[f"{role}_token"] = self.processor.id_to_piece(index)
        converted = self._convert()
        different = [] if converted is None else self._differences(converted)
        if converted and not different:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config["clean_up_tokenization_spaces"] = False
            artifacts.write_text(directory / "tokenizer.json", converted.to_str(pretty=True))
        else:
            reason = (
                f"transformers' form of it gives other ids for {different[0]!r}"
                if different
                else "it is not a BPE model"
            )
            log.warning("no tokenizer.json is written, only tokenizer.model: %s", reason)
        artifacts.write_json(directory / "tokenizer_config.json", config)

    def _differences(self, converted: Any) -> list[str]:
        """Texts to which the converted tokenizer gives other ids: hard ones and every piece."""
        pieces = [f"x{piece.replace('▁', ' ')}" for piece in self.vocabulary()]
        texts = [*HARD_TEXTS, *pieces]
        theirs = converted.encode_batch_fast(texts, add_special_tokens=False)
        return [
            text
            for text, ids, encoding in zip(texts, self.encode_batch(texts), theirs, strict=True)
            if ids != encoding.ids
        ]

    def _convert(self) -> Any:
        """The model as a ``tokenizers.Tokenizer``, or None for kinds that are not covered."""
        from sentencepiece import sentencepiece_model_pb2 as schema
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

        proto = schema.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self.model)
        pieces = [(piece.piece, piece.score) for piece in proto.pieces]
        kinds = [piece.type for piece in proto.pieces]
        kind = proto.SentencePiece
        spec = proto.normalizer_spec
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            return None  # unigram in tokenizers also finds <s> and </s> in plain text
        backend = Tokenizer(
            models.BPE(
                {piece: index for index, (piece, _) in enumerate(pieces)},
                _merges(pieces, kinds, kind.NORMAL),
                unk_token=self.processor.id_to_piece(self.processor.unk_id()),
                fuse_unk=True,
                byte_fallback=proto.trainer_spec.byte_fallback,
            )
        )
        steps: list[Any] = []
        if spec.precompiled_charsmap:
            steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
        if spec.remove_extra_whitespaces:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend("▁"))
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []),
            ]
        )
        backend.add_special_tokens(
            [
                AddedToken(piece, normalized=False, special=True)
                for (piece, _), this in zip(pieces, kinds, strict=True)
                if this in (kind.CONTROL, kind.UNKNOWN)
            ]
        )
        backend.encode_special_tokens = True
        return backend


def _merges(
    pieces: list[tuple[str, float]], kinds: list[int], normal: int
) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, best score first, as BPE wants them."""
    score = {
        piece: value for (piece, value), kind in zip(pieces, kinds, strict=True) if kind == normal
    }
    ranked = sorted(score, key=lambda piece: -score[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]


def load(file: str | Path) -> SentencePieceTokenizer:
    """Read a ``.model`` file; DataError when it is none."""
    return SentencePieceTokenizer(Path(file).read_bytes(), file)
