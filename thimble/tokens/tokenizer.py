"""Tokenizers: byte-level BPE trained here, or one that exists already, behind one interface.

Encoding never makes special tokens: the text ``<|endoftext|>`` inside a document is text. The only
way to the special id is ``eot_id``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from thimble import artifacts
from thimble.errors import DataError

END_OF_TEXT, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
MIN_VOCAB_SIZE = 256 + 3  # every byte and the special tokens
MAX_RUN = 64  # characters; longer runs of one kind are cut, so no "word" can be a megabyte

# What byte-pair merges may not cross: contractions, words with one leading character, up to three
# digits, punctuation, line ends, other whitespace. These are the classes of the Llama 3 family,
# which inference engines know, with every unbounded run capped at MAX_RUN.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}{1,64}"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,64}[\r\n]{0,64}"
    r"|\s{0,64}[\r\n]{1,64}"
    r"|\s{1,64}(?!\S)"
    r"|\s{1,64}"
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

# Text whose ids tell two tokenizers of one vocabulary apart: spaces, digits, case, scripts, bytes.
PROBE = (
    "Hello\n  indented\t0x1F2e 12345  don't   STOP… naïve 漢字 🙂 \u0000\r\n<|endoftext|></s>\n\n\n"
)


class Tokenizer(Protocol):
    """What every tokenizer here can do. Ids are plain ints below ``vocab_size``."""

    vocab_size: int
    eot_id: int
    pad_id: int | None

    @property
    def fingerprint(self) -> str: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def vocabulary(self) -> dict[str, int]: ...
    def save(self, directory: str | Path) -> None: ...


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give equal ids, however and by whichever version they were saved."""
    return artifacts.fingerprint(
        [sorted(tokenizer.vocabulary().items()), tokenizer.encode(PROBE), tokenizer.eot_id]
    )


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library: ours, or any ``tokenizer.json``."""

    def __init__(self, backend: Any, config: dict[str, Any], where: object) -> None:
        backend.no_truncation()  # a limit in the file would cut documents without a word
        backend.no_padding()
        backend.encode_special_tokens = True  # their text inside a document stays text
        self.backend = backend
        self.config = config
        # Ids may have gaps; what a model's embedding needs is the highest one.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        eot = config.get("eos_token") or END_OF_TEXT
        eot = eot["content"] if isinstance(eot, dict) else eot
        eot_id = backend.token_to_id(eot)
        if eot_id is None:
            raise DataError(
                f"The tokenizer {where} has no end-of-text token: neither {END_OF_TEXT} nor an "
                "eos_token in its tokenizer_config.json. Add one there."
            )
        self.eot_id: int = eot_id
        pad = config.get("pad_token") or PAD
        self.pad_id: int | None = backend.token_to_id(
            pad["content"] if isinstance(pad, dict) else pad
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint_of(self)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(map(int, ids)), skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        artifacts.write_text(directory / "tokenizer.json", self.backend.to_str(pretty=True))
        artifacts.write_json(directory / "tokenizer_config.json", self.config)


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
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return HuggingFaceTokenizer(backend, config, "just trained")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a folder, a ``tokenizer.json``, a SentencePiece ``.model`` or a hub id.

    Raises DataError when what is there cannot be read as a tokenizer, EnvironmentProblem when a
    hub id cannot be fetched. Runs no code from the folder or the hub.
    """
    where = Path(path)
    if where.is_dir():
        if (where / "tokenizer.json").is_file():
            return _from_json(where / "tokenizer.json")
        raise DataError(f"{where} holds no tokenizer.json or tokenizer.model.")
    if where.is_file():
        return _from_json(where)
    raise DataError(f"There is no tokenizer at {path}.")


def _from_json(file: Path) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error
    config_file = file.with_name("tokenizer_config.json")
    config = artifacts.read_json(config_file) if config_file.is_file() else {}
    return HuggingFaceTokenizer(backend, config, file)
