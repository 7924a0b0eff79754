"""The data sets of the distillation documents: where each is, its licence, its fields, its cap.

``licence`` is what the documents say; what the hub says stands beside it after a download or a dry
run, and where they differ that is said. A data set that can no longer be had is listed all the same
with the reason, so that nobody waits for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

CATEGORIES = ("instruction_chat", "code", "math_reasoning", "factual_qa")
ROLES = {
    **dict.fromkeys(("human", "user"), "User"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "Assistant"),
    **dict.fromkeys(("system", "system_prompt"), "System"),
}
CONVERTED = "refs/convert/parquet"  # where the hub keeps a parquet copy of most data sets


class Mismatch(ValueError):
    """A record does not have the field it should have."""


@dataclass(frozen=True)
class Part:
    """A field of a record under a label: ``answers.text`` is the first text found on that way.

    ``optional``: left out where it is empty. ``encoded``: a JSON text that holds the value.
    """

    label: str
    path: str
    optional: bool = False
    encoded: bool = False

    def value(self, record: Mapping[str, Any]) -> str:
        found: Any = record
        keys = self.path.split(".")
        if self.encoded:
            found = next(values(record, keys, self.path), "")
            found = json.loads(found) if found.strip() else ""
            keys = []
        return next((text for text in values(found, keys, self.path) if text.strip()), "").strip()


def values(found: Any, keys: list[str], path: str) -> Iterator[str]:
    """The texts at the end of ``keys``, of every element where there are several."""
    if found is None:
        return
    if isinstance(found, list):
        for each in found:
            yield from values(each, keys, path)
    elif keys:
        if not isinstance(found, dict) or keys[0] not in found:
            has = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
            raise Mismatch(f"no field {path}; there is: {has or 'nothing'}")
        yield from values(found[keys[0]], keys[1:], path)
    elif isinstance(found, str):
        yield found
    else:
        raise Mismatch(f"{path} is a {type(found).__name__}, not a text")


@dataclass(frozen=True)
class Source:
    """A data set of the hub. ``files`` is a pattern on its main branch, ``converted`` one for
    what that branch may not have; ``turns``: the fields of a conversation, of a role and of what
    was said; ``gone``: why it cannot be had."""

    repository: str
    category: str
    licence: str
    files: str
    parts: tuple[Part, ...] = ()
    turns: tuple[str, str, str] | None = None
    converted: str = ""
    gone: str = ""

    @property
    def columns(self) -> list[str]:
        """The fields that are read, by their first names."""
        paths = [part.path for part in self.parts] or [self.turns[0] if self.turns else ""]
        return list(dict.fromkeys(path.split(".")[0] for path in paths))

    def text(self, record: Any) -> str:
        """A record as text; empty where a part of it is. Raises Mismatch."""
        if not isinstance(record, dict):
            raise Mismatch(f"a record is a {type(record).__name__}, not an object")
        if self.turns:
            return self._conversation(record, *self.turns)
        said = [(part, part.value(record)) for part in self.parts]
        if any(not text and not part.optional for part, text in said):
            return ""
        lines = [f"{part.label}: {text}" if part.label else text for part, text in said if text]
        return "\n\n".join(lines)

    def _conversation(self, record: dict[str, Any], name: str, role: str, content: str) -> str:
        if name not in record:
            raise Mismatch(f"no field {name}; there is: {', '.join(record) or 'nothing'}")
        lines = []
        for turn in record[name] or []:
            who = Part("", role).value(turn)
            if who not in ROLES:
                raise Mismatch(f"a turn by {who!r}, expected one of {', '.join(ROLES)}")
            if text := Part("", content).value(turn):
                lines.append((ROLES[who], text))
        if not {"User", "Assistant"} <= {who for who, _ in lines}:
            return ""
        return "\n\n".join(f"{who}: {text}" for who, text in lines)


def asked(question: str, answer: str, *more: Part) -> tuple[Part, ...]:
    return (*more, Part("Question", question), Part("Answer", answer))


def solved(problem: str, solution: str) -> tuple[Part, ...]:
    return (Part("Problem", problem), Part("Solution", solution))


def instructed(given: str, output: str) -> tuple[Part, ...]:
    return (
        Part("User", "instruction"),
        Part("Input", given, optional=True),
        Part("Assistant", output),
    )


SHAREGPT = ("conversations", "from", "value")
CHAT, CODE, MATH, FACTS = CATEGORIES
STACK = "it holds names of files kept by Software Heritage, and no text"
TAKEN_DOWN = "taken down in 2025 after a claim of copyright"

SOURCES = {
    "openhermes": Source(
        *("teknium/OpenHermes-2.5", CHAT, "apache-2.0", "openhermes2_5.json"), turns=SHAREGPT
    ),
    "ultrachat": Source(
        *("HuggingFaceH4/ultrachat_200k", CHAT, "mit", "data/train_sft-*.parquet"),
        turns=("messages", "role", "content"),
    ),
    "openorca": Source(
        *("Open-Orca/OpenOrca", CHAT, "apache-2.0", "*.parquet"),
        (
            Part("System", "system_prompt", optional=True),
            Part("User", "question"),
            Part("Assistant", "response"),
        ),
    ),
    "sharegpt": Source(
        *("anon8231489123/ShareGPT_Vicuna_unfiltered", CHAT, "cc-by-nc-4.0"),
        "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
        turns=SHAREGPT,
    ),
    "alpaca_gpt4": Source(
        *("vicgalle/alpaca-gpt4", CHAT, "apache-2.0", "data/train-*.parquet"),
        instructed("input", "output"),
    ),
    "dolly": Source(
        *("databricks/databricks-dolly-15k", CHAT, "cc-by-sa-3.0"),
        "databricks-dolly-15k.jsonl",
        instructed("context", "response"),
    ),
    "starcoderdata": Source(
        *("bigcode/starcoderdata", CODE, "openrail", "python/train-*.parquet"),
        (Part("", "content"),),
    ),
    "the_stack_v2": Source(
        *("bigcode/the-stack-v2", CODE, "openrail", "data/Python/*.parquet"),
        (Part("", "content"),),
        gone=STACK,
    ),
    "codealpaca": Source(
        *("sahil2801/CodeAlpaca-20k", CODE, "apache-2.0", "code_alpaca_20k.json"),
        instructed("input", "output"),
    ),
    "code_contests": Source(
        *("deepmind/code_contests", CODE, "apache-2.0", "data/train-*.parquet"),
        solved("description", "solutions.solution"),
    ),
    "apps": Source(
        *("codeparrot/apps", CODE, "mit", "train.jsonl"),
        (Part("Problem", "question"), Part("Solution", "solutions", encoded=True)),
    ),
    "codesearchnet": Source(
        *("code-search-net/code_search_net", CODE, "mit", "python/train-*.parquet"),
        (Part("", "whole_func_string"),),
        converted="python/*train/*.parquet",
    ),
    "mbpp": Source(
        *("google-research-datasets/mbpp", CODE, "cc-by-4.0", "full/train-*.parquet"),
        solved("text", "code"),
    ),
    "numinamath": Source(
        *("AI-MO/NuminaMath-CoT", MATH, "apache-2.0", "data/train-*.parquet"),
        solved("problem", "solution"),
    ),
    "gsm8k": Source(
        *("openai/gsm8k", MATH, "mit", "main/train-*.parquet"), solved("question", "answer")
    ),
    "math": Source(
        *("lighteval/MATH", MATH, "mit", "data/train-*.parquet"),
        solved("problem", "solution"),
        gone=TAKEN_DOWN,
    ),
    "metamath": Source(
        *("meta-math/MetaMathQA", MATH, "mit", "MetaMathQA-395K.json"), solved("query", "response")
    ),
    "orca_math": Source(
        *("microsoft/orca-math-word-problems-200k", MATH, "mit", "data/train-*.parquet"),
        solved("question", "answer"),
    ),
    "mathinstruct": Source(
        *("TIGER-Lab/MathInstruct", MATH, "cc-by-4.0", "MathInstruct.json"),
        solved("instruction", "output"),
    ),
    "natural_questions": Source(
        *("google-research-datasets/natural_questions", FACTS, "apache-2.0"),
        "default/train-*.parquet",
        asked("question.text", "annotations.short_answers.text"),
    ),
    "hotpot_qa": Source(
        *("hotpotqa/hotpot_qa", FACTS, "cc-by-sa-4.0", "distractor/train-*.parquet"),
        asked("question", "answer"),
    ),
    "squad_v2": Source(
        *("rajpurkar/squad_v2", FACTS, "cc-by-sa-4.0", "squad_v2/train-*.parquet"),
        asked("question", "answers.text", Part("Context", "context")),
    ),
    "trivia_qa": Source(
        *("mandarjoshi/trivia_qa", FACTS, "apache-2.0", "rc.nocontext/train-*.parquet"),
        asked("question", "answer.value"),
    ),
    "web_questions": Source(
        *("stanfordnlp/web_questions", FACTS, "cc-by-4.0", "data/train-*.parquet"),
        asked("question", "answers"),
    ),
}


@dataclass(frozen=True)
class Plan:
    """Which data sets, and of each how many samples at most."""

    caps: Mapping[str, int]
    about: str = field(default="")


PLANS = {
    "poc": Plan(
        {"metamath": 100_000, "codesearchnet": 100_000, "apps": 50_000, "mbpp": 50_000},
        "mathematics and code to begin with",
    ),
    "curriculum": Plan(
        {
            "openhermes": 2_500_000,
            "ultrachat": 200_000,
            "openorca": 3_000_000,
            "sharegpt": 1_000_000,
            "alpaca_gpt4": 52_000,
            "dolly": 15_000,
            "starcoderdata": 3_000_000,
            "the_stack_v2": 2_000_000,
            "codealpaca": 100_000,
            "code_contests": 200_000,
            "apps": 500_000,
            "codesearchnet": 500_000,
            "numinamath": 3_000_000,
            "gsm8k": 100_000,
            "math": 100_000,
            "metamath": 1_000_000,
            "orca_math": 600_000,
            "mathinstruct": 500_000,
            "natural_questions": 800_000,
            "hotpot_qa": 500_000,
            "squad_v2": 400_000,
            "trivia_qa": 700_000,
            "web_questions": 100_000,
        },
        "chat, code, mathematics and facts",
    ),
}
