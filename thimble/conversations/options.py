"""The keys of instruction data, named as in the documents of the recursive model."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from thimble.config.schema import Fraction, Section
from thimble.errors import ConfigError

SYSTEM_MESSAGE = "A conversation between a user and a helpful assistant."
TOKENIZER_VARIABLE = "LLAMA_TOKENIZER"


class DatasetConfig(Section):
    """Which conversations a model learns from, and how they become tokens."""

    name: str = Field(
        default="slimorca",
        min_length=1,
        description="slimorca or openorca (fetched from the hub), or a file or folder of your own.",
    )
    data_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder with the files, or where they are fetched to; null: data/NAME.",
    )
    subset_size: int | None = Field(
        default=None,
        ge=1,
        description="So many records of the whole, drawn before the split; null: all.",
    )
    seq_len: int = Field(default=512, ge=1, description="Longest example, in input tokens.")
    test_ratio: Fraction = Field(
        default=0.05, description="Share of the prompts held out as the test split."
    )
    tokenizer_path: str | None = Field(
        default=None,
        min_length=1,
        description=f"Folder, tokenizer.json or SentencePiece .model; null: ${TOKENIZER_VARIABLE}.",
    )
    vocab_size: int | None = Field(
        default=None, ge=2, description="Entries the tokenizer has to have; null: any."
    )
    template: Literal["plain", "chat"] = Field(
        default="plain",
        description="plain: [SYSTEM], [USER] and [ASSISTANT] lines; chat: the tokenizer's own.",
    )
    system_message: str = Field(
        default=SYSTEM_MESSAGE,
        description='System text of conversations without one; "": none.',
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="Of the subset, the split and the order."
    )

    def tokenizer(self) -> str:
        """The path of the tokenizer; ConfigError when neither the key nor the variable is set."""
        path = self.tokenizer_path or os.environ.get(TOKENIZER_VARIABLE)
        if not path:
            raise ConfigError(
                "Which tokenizer? Name a folder, a tokenizer.json or a SentencePiece .model with "
                "--tokenizer PATH (in a recipe dataset.tokenizer_path=PATH), or set the variable "
                f"{TOKENIZER_VARIABLE}."
            )
        return path


class BatchConfig(Section):
    """How many conversations a step sees, and how often each is seen."""

    global_batch_size: int = Field(
        default=32, ge=1, description="Conversations of one step, over all processes."
    )
    epochs: int = Field(default=1, ge=1, description="Times that each conversation is seen.")
    dataloader_workers: int = Field(
        default=2,
        ge=0,
        description="Processes that tokenize; 0: none beside this one. Batches need none.",
    )
