"""The benchmark asks only for what the training text does not contain, and scores fairly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from thimble import tokens
from thimble.artifacts import atomic_directory, write_manifest
from thimble.corpora.facts import INSTALLATION, SKILLS
from thimble.corpora.questions import of_package
from thimble.errors import DataError
from thimble.evaluation import domain
from thimble.tokens.shards import TokenSplit
from thimble.tokens.tokenizer import load_tokenizer

WORDS = ["disk", "image", "mail", "proxy", "kernel", "font", "game"]
WORDS += ["sound", "parser", "printer", "radio", "shell", "clock"]


def about(i: int) -> str:
    return f"{WORDS[i % 13]} {WORDS[i // 13 % 13]} number {i} of its kind"


def write_corpus(directory: Path, packages: int = 400, planted: int = 60) -> Path:
    """Questions about packages, and plain text that repeats the description of some of them."""
    rows = []
    for i in range(packages):
        for j, question in enumerate(of_package(f"pkg{i}", about(i), "misc")):
            rows.append((f"q{i}.{j}", question.text(), "qa", question.group))
    for i in range(planted):
        # Too large a share of the corpus to be held out whole, and one group: trained on.
        # In another case, and broken into lines as text is.
        said = about(i).capitalize().replace(" ", "\n  ", 1)
        rows.append((f"t{i}", f"Elsewhere it says: {said}. " * 8, "text", "one"))
    names = ("id", "text", "category", "group")
    table = pa.table({name: [row[n] for row in rows] for n, name in enumerate(names)})
    for name in ("source", "licence"):
        table = table.append_column(name, pa.array(["made"] * len(rows)))
    with atomic_directory(directory) as folder:
        pq.write_table(table, folder / "documents-00000.parquet")
        write_manifest(folder, "corpus", inputs=["made"], options={}, counts={})
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("data")
    corpus = write_corpus(home / "corpus" / "os")
    return Path(tokens.build(corpus, output=home / "tokens" / "os", vocab_size=300, workers=1))


def training_text(directory: Path) -> str:
    train = TokenSplit(directory, "train")
    return load_tokenizer(directory).decode(train.tokens.tolist())


def test_no_item_is_in_the_training_text(made: Path) -> None:
    found = domain.benchmark(made)
    text = " ".join(training_text(made).lower().split())
    assert found["items"]
    for item in found["items"]:
        described = item.prompt.split("described as: ")[1].split("?\n")[0]
        assert described not in text
        assert len(set(item.choices)) == domain.CHOICES
        assert f"package:{item.choices[item.answer].split('.')[0].strip()}" == item.key
    skill = found["skills"][INSTALLATION]
    assert skill["items"] == len(found["items"])
    # Some of the held-out facts were planted in the training text, and they are counted.
    assert skill["in_training_text"] > 0
    assert skill["facts_looked_for"] == skill["facts"]
    assert set(found["skills"]) == set(SKILLS)


def test_it_is_made_once_and_always_alike(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = domain.benchmark(made)
    (made / domain.FILE).unlink()
    assert domain.benchmark(made)["items"] == first["items"]
    monkeypatch.setattr(domain, "_make", lambda *_: pytest.fail("made again"))
    assert domain.benchmark(made)["items"] == first["items"]


def test_without_its_corpus_it_says_how_to_get_it(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "elsewhere" / "os", packages=80, planted=10)
    directory = tokens.build(corpus, output=tmp_path / "a" / "b", vocab_size=300, workers=1)
    with pytest.raises(DataError, match=r"corpus os .* not there.*thimble corpus build"):
        domain.benchmark(directory)


def test_text_without_such_questions_has_no_benchmark(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus" / "os", packages=0, planted=400)
    directory = tokens.build(corpus, output=tmp_path / "tokens" / "os", vocab_size=300, workers=1)
    with pytest.raises(DataError, match="no held-out questions"):
        domain.benchmark(directory)


def test_too_few_facts_for_wrong_answers_are_no_benchmark(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domain, "CHOICES", 1000)
    with pytest.raises(DataError, match=r"holds out \d+ such facts: too few"):
        domain.benchmark(made)


class Oracle:
    """A model whose likelihood of a text is set by the last tokens of its targets."""

    device = torch.device("cpu")

    def __init__(self, directory: Path, liked: set[str], context: int = 512) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.liked = liked

    def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = torch.zeros(targets.shape)
        for row, ids in enumerate(targets):
            answer = self.tokenizer.decode(ids[ids != domain.IGNORED].tolist())
            losses[row, -1] = (0.1 if answer in self.liked else 1.0) * len(answer.encode())
        return losses


def test_the_score_is_the_share_of_right_answers(made: Path) -> None:
    found = domain.benchmark(made)
    for item in found["items"][:5]:
        single = {**found, "items": [item]}
        for place, choice in enumerate(item.choices):
            score = domain.score(Oracle(made, {choice}), single)
            assert score["accuracy"] == (place == item.answer)
            assert score["skills"][item.skill]["accuracy"] == score["accuracy"]
    right = {item.choices[item.answer] for item in found["items"][:4]}
    four = domain.score(Oracle(made, right), {**found, "items": found["items"][:4]})
    assert four["accuracy"] == 1
    assert four["standard_error"] == 0
    assert four["items"] == 4


def test_only_the_answer_is_scored_and_long_questions_are_counted(made: Path) -> None:
    found = domain.benchmark(made)
    item = found["items"][0]
    oracle = Oracle(made, {item.choices[item.answer]})
    seen: list[str] = []
    nll = oracle.nll

    def watch(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.extend(oracle.tokenizer.decode(row[row != domain.IGNORED].tolist()) for row in targets)
        return nll(inputs, targets)

    oracle.nll = watch  # type: ignore[method-assign]
    single = {**found, "items": [item]}
    assert domain.score(oracle, single)["cut"] == 0
    assert sorted(seen) == sorted(item.choices)
    longest = max(len(oracle.tokenizer.encode(choice)) for choice in item.choices)
    oracle.config.max_position_embeddings = longest + 1
    seen.clear()
    cut = domain.score(oracle, single)
    assert cut["cut"] == 1
    assert sorted(seen) == sorted(item.choices)  # what is cut is the question


def test_word_overlap_shares_ties() -> None:
    def item(prompt: str, choices: list[str], answer: int) -> domain.Item:
        return domain.Item("skill", "key", "test", prompt, choices, answer)

    clear = ["mount", "lsblk", "grepx", "zypper"]
    assert domain.overlap(item("how to mount a disk", clear, 0)) == 1
    assert domain.overlap(item("how to mount a disk", clear, 1)) == 0
    assert domain.overlap(item("0", clear, 1)) == 1 / 4


def test_a_model_that_tells_nothing_apart_is_near_chance(made: Path) -> None:
    found = domain.benchmark(made)

    class Blind(Oracle):
        def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            noise = torch.from_numpy(np.random.default_rng(0).random(targets.shape)).float()
            return noise.masked_fill(targets == domain.IGNORED, 0)

    accuracy = domain.score(Blind(made, set()), found)["accuracy"]
    n = len(found["items"])
    assert abs(accuracy - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5
