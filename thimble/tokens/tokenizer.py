"""Tokenizers: byte-level BPE trained here, or one that exists already, behind one interface.

Encoding never makes special tokens: the text ``<|endoftext|>`` inside a document is text. The only
way to the special id is ``eot_id``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thimble import artifacts
from thimble.errors import DataError
from thimble.snapshot import fetch
from thimble.tokens import shards

END_OF_TEXT, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
MIN_VOCAB_SIZE = 256 + 3  # every byte and the special tokens

# What byte-pair merges may not cross: contractions, words with one leading character, up to three
# digits, punctuation, line ends, other whitespace. These are the classes of the Llama 3 family,
# which inference engines know, with every unbounded run capped at 64 characters, so that no "word"
# can be a megabyte. Classes stand in brackets, so that _ASCII_WORDS can be made from it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}]{1,64}"
    r"|[\p{N}]{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}"
    r"|[\s]{0,64}[\r\n]{1,64}"
    r"|[\s]{1,64}(?![^\s])"
    r"|[\s]{1,64}"
)

# A conversation as the plain document it is in the corpus: "Question: ...\nAnswer: ...".
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\\n' }}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)

# Text whose ids tell tokenizers of one vocabulary apart: spaces, digits, case, scripts, bytes.
PROBE = (
    "Hello\n  indented\t0x1F2e 12345  don't   STOP… naïve 漢字 🙂 \x00\r\n<|endoftext|></s>\n\n\n"
)


class Tokenizer(Protocol):
    """What every tokenizer here can do. Ids are plain ints below ``vocab_size``.

    ``pack(texts)`` gives the ids of all texts one after the other, each followed by ``eot_id``, in
    the dtype of the shards, and how many each took (with that end) as int64 [number of texts].
    """

    vocab_size: int
    eot_id: int
    pad_id: int | None

    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def vocabulary(self) -> dict[str, int]: ...
    def save(self, directory: str | Path) -> None: ...


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give equal ids, however and by whatever version they were saved."""
    return artifacts.fingerprint(
        [sorted(tokenizer.vocabulary().items()), tokenizer.encode(PROBE), tokenizer.eot_id]
    )


def pack_lists(
    encoded: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """``Tokenizer.pack`` from lists of ids."""
    end = (tokenizer.eot_id,)
    dtype = shards.dtype_for(tokenizer.vocab_size)
    flat = np.fromiter(chain.from_iterable(chain(ids, end) for ids in encoded), dtype=dtype)
    return flat, np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library, from any ``tokenizer.json``.

    ``config`` is the content of its ``tokenizer_config.json``, for the names of special tokens.
    """

    def __init__(self, backend: Any, config: dict[str, Any], where: object) -> None:
        backend.no_truncation()  # a limit in the file would cut documents without a word
        backend.no_padding()
        backend.encode_special_tokens = True  # their text inside a document stays text
        self.backend = backend
        # Only what names tokens and chats: a class of its own would rebuild the tokenizer, an
        # auto_map would ask to run code.
        self.config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": config.get("chat_template") or CHAT_TEMPLATE,
        }
        for role, ours in (
            ("bos_token", None),
            ("eos_token", END_OF_TEXT),
            ("pad_token", PAD),
            ("unk_token", None),
        ):
            token = config.get(role) or ours
            token = token["content"] if isinstance(token, dict) else token
            if token is not None and backend.token_to_id(token) is not None:
                self.config[role] = token
        if "eos_token" not in self.config:
            raise DataError(
                f"The tokenizer {where} has no end-of-text token: neither {END_OF_TEXT} nor an "
                "eos_token in its tokenizer_config.json. Name one there."
            )
        # Ids may have gaps; what a model's embedding needs is the highest one.
        self.vocab_size: int = 1 + max(self.vocabulary().values())
        self.eot_id: int = backend.token_to_id(self.config["eos_token"])
        self.pad_id: int | None = (
            backend.token_to_id(self.config["pad_token"]) if "pad_token" in self.config else None
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return pack_lists(self.encode_batch(texts), self)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens; broken UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """token -> id, in the order of the ids; the library's own order is random."""
        found = self.backend.get_vocab(with_added_tokens=True)
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def save(self, directory: str | Path) -> None:
        """Write the two files from which ``load_tokenizer`` and AutoTokenizer give the same ids."""
        directory = Path(directory)
        artifacts.write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        artifacts.write_json(directory / "tokenizer_config.json", self.config)


# On ASCII text Python's own regular expressions mean the same and are several times faster.
_ASCII_WORDS = re.compile(
    WORDS.replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9").replace(r"\s", r" \t\n\v\f\r")
)
# No word of WORDS goes on after a line end with a character that is not whitespace.
_LINES = re.compile(r"(?<=\n)(?=[!-~])")
# The characters byte-level models write in place of those ASCII ones that cannot be seen.
_BYTE_LEVEL = {code: 256 + place for place, code in enumerate([*range(33), 127])}
_CACHED_WORDS = 1 << 18  # about 60 MB


class ByteLevelBPE(HuggingFaceTokenizer):
    """The tokenizer trained here. Its ids are those of the library, only sooner.

    What a word becomes does not depend on its surroundings, and text repeats its words. So ``pack``
    encodes each once and looks it up from then on; lines with characters beyond ASCII go to the
    library whole. See ``benchmarks/tokens.py`` for what that gains.
    """

    def __init__(self, backend: Any, config: dict[str, Any], where: object) -> None:
        super().__init__(backend, config, where)
        self.dtype = shards.dtype_for(self.vocab_size)
        self.words = _Words(backend, self.dtype)
        self.end = np.array([self.eot_id], dtype=self.dtype).tobytes()

    def pack(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(self.words) > _CACHED_WORDS:
            self.words.clear()
        lookup = self.words.__getitem__
        parts = [b"".join(map(lookup, _words(text))) + self.end for text in texts]
        lengths = np.array([len(part) for part in parts], dtype=np.int64) // self.dtype.itemsize
        return np.frombuffer(b"".join(parts), dtype=self.dtype), lengths


class _Words(dict[str, bytes]):
    """word -> its ids as bytes; one that is not there yet is encoded."""

    def __init__(self, backend: Any, dtype: np.dtype) -> None:
        self.encode, self.tokenize, self.dtype = backend.encode, backend.model.tokenize, dtype

    def __missing__(self, word: str) -> bytes:
        if not word.isascii():  # a whole line, hardly ever seen again
            ids = self.encode(word, add_special_tokens=False).ids
            return np.array(ids, dtype=self.dtype).tobytes()
        ids = [token.id for token in self.tokenize(word.translate(_BYTE_LEVEL))]
        self[word] = found = np.array(ids, dtype=self.dtype).tobytes()
        return found


def _words(text: str) -> list[str]:
    """``text`` in pieces whose ids, joined, are those of the text."""
    if text.isascii():
        return _ASCII_WORDS.findall(text)
    words: list[str] = []
    for is_ascii, lines in groupby(_LINES.split(text), str.isascii):
        joined = "".join(lines)
        words += _ASCII_WORDS.findall(joined) if is_ascii else [joined]
    return words


def train(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Train a byte-level BPE on ``texts``; the same texts in the same order give the same one.

    The vocabulary stays smaller than asked for when the text has too few pairs that occur twice.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[END_OF_TEXT, PAD, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(texts, trainer)
    config = {"bos_token": END_OF_TEXT, "unk_token": UNKNOWN}
    return ByteLevelBPE(backend, config, "just trained")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder, a ``tokenizer.json``, a SentencePiece ``.model`` or a hub id.

    Raises DataError when what is there cannot be read as a tokenizer, EnvironmentProblem when a
    hub id cannot be fetched. Runs no code from the folder or the hub.
    """
    from thimble.tokens import sentencepiece

    where = Path(path)
    if where.is_dir():
        config = _config(where)
        if config.get(sentencepiece.MARK) or not (where / "tokenizer.json").is_file():
            for model in sorted(where.glob("*.model")):
                return sentencepiece.load(model)
        if (where / "tokenizer.json").is_file():
            return _from_json(where / "tokenizer.json", config)
        return _from_older_files(where, config)
    if where.is_file():
        if where.suffix == ".model":
            return sentencepiece.load(where)
        return _from_json(where, _config(where.parent))
    if where.suffix in (".json", ".model") or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(path)):
        raise DataError(f"There is no tokenizer at {path}.")
    return load_tokenizer(_download(str(path)))


def _config(folder: Path) -> dict[str, Any]:
    """What a folder says about its tokenizer; empty when it says nothing."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = artifacts.read_json(folder / name)
            if not isinstance(content, dict):
                raise DataError(f"{folder / name} is not a JSON object.")
            config |= {key: value for key, value in content.items() if value is not None}
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return config


def _from_json(file: Path, config: dict[str, Any]) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file} is not a tokenizer that can be read: {error}") from error
    layout = json.loads(backend.to_str())
    splitter = layout["pre_tokenizer"] or {}
    ours = (
        layout["normalizer"] is None
        and [part["type"] for part in splitter.get("pretokenizers", [])] == ["Split", "ByteLevel"]
        and splitter["pretokenizers"][0]["pattern"] == {"Regex": WORDS}
        and all(token["special"] for token in layout["added_tokens"])
        and layout["model"]["type"] == "BPE"
    )
    return (ByteLevelBPE if ours else HuggingFaceTokenizer)(backend, config, file)


def _from_older_files(folder: Path, config: dict[str, Any]) -> HuggingFaceTokenizer:
    """vocab.json with merges.txt, vocab.txt and their like, as transformers reads them."""
    if not any((folder / name).is_file() for name in ("vocab.json", "vocab.txt", "spiece.model")):
        raise DataError(f"{folder} holds no tokenizer: no tokenizer.json, *.model or vocab file.")
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = loaded.backend_tokenizer
    except Exception as error:  # any of a hundred classes, each with errors of its own
        raise DataError(f"transformers cannot read a tokenizer in {folder}: {error}") from error
    return HuggingFaceTokenizer(backend, loaded.special_tokens_map | config, folder)


def _download(name: str) -> str:
    wanted = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"]
    older = ["special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"]
    return str(fetch(name, "tokenizer", wanted + older))
