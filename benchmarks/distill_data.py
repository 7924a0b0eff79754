"""What ``distill.py`` works on, made on the spot: text of random words, teachers with random
weights, targets of nobody. No speed depends on what words mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from thimble.config.load import load
from thimble.models import interop
from thimble.objectives.sparse_targets import SparseTargets
from thimble.teachers.asked import Asked
from thimble.teachers.cache import TeacherCache
from thimble.teachers.models import without_bars
from thimble.tokens.packing import pack

WORDS = 500  # of a document, on average
END = "<|endoftext|>"


def make_tokenizer(folder: Path, vocabulary: int) -> Path:
    """A token for every word, so that ids are drawn evenly from the whole vocabulary."""
    words = {END: 0, **{f"w{number}": number for number in range(1, vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    special = {"eos_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def make_packed(folder: Path, tokenizer: Path, vocabulary: int, tokens: int, length: int) -> Path:
    """``thimble tokens pack`` of about so many tokens in chunks of ``length``."""
    draw = np.random.default_rng(0)
    source, left = folder.with_name(f"{folder.name}-text"), tokens
    source.mkdir()
    with open(source / "text.jsonl", "w") as file:
        while left > 0:
            count = int(draw.integers(WORDS // 2, 3 * WORDS // 2))
            text = " ".join(f"w{number}" for number in draw.integers(1, vocabulary, count))
            file.write(json.dumps({"text": text}) + "\n")
            left -= count + 1
    pack(source, folder, max_seq_length=length, tokenizer=str(tokenizer), val_ratio=0, workers=1)
    return folder


def make_teacher(folder: Path, tokenizer: Path, shape: str, vocabulary: int) -> Path:
    """A llama of a recipe's shape with random weights."""
    import transformers

    config = load(shape, [f"model.vocab_size={vocabulary}"]).model
    native = interop.to_native_config(config, {"eos": 0})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(native.pop("model_type"), **native)
    )
    with without_bars():
        model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@dataclass
class Nothing:
    """Stands for a data set in a cache of targets of nobody."""

    count: int
    length: int
    vocab_size: int
    directory: Path = Path("nowhere")
    identity: ClassVar = {"data": "none"}
    tokenizer: ClassVar[Any] = SimpleNamespace(fingerprint="none")

    def rows(self, numbers: Any) -> Any:
        raise NotImplementedError


def make_cache(folder: Path, vocabulary: int, k: int, rows: int, length: int) -> TeacherCache:
    """A complete cache of random targets at the temperatures 1 and 2."""
    asked = Asked(k, (1.0, 2.0))
    cache = TeacherCache.create(folder, Nothing(rows, length, vocabulary), {"teacher": None}, asked)
    draw = torch.Generator().manual_seed(0)
    for number in range(rows):
        indices = torch.randint(vocabulary, (1, length, k), generator=draw)
        log_probs = torch.log_softmax(torch.randn(1, length, k + 1, generator=draw), -1)
        tail = log_probs[..., -1:].expand(-1, -1, 2)
        targets = SparseTargets(indices, log_probs[..., :-1], tail, asked.temperatures)
        cache.write([number], targets)
    cache.seal()
    return cache
