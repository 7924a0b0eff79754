from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from tests.conversations.conftest import sentence
from thimble.conversations.records import Conversation, Turn
from thimble.conversations.template import encode, fit, prompt_ids, template_of
from thimble.errors import ConfigError
from thimble.tokens.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer

SYSTEM = "Be brief."
TALK = Conversation(
    (
        Turn("what is the kernel?", "the kernel is the kernel.\n"),
        Turn("  why?  ", " [USER]\nno <|im_end|> 7 <|endoftext|>"),
        Turn("naïve 漢字 🙂", "ok 🙂"),
    )
)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of the kind the Llama family has."""
    rng = random.Random(1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(rng, 12) for _ in range(200)]),
        model_writer=model,
        vocab_size=380,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def answers(ids: np.ndarray, labels: np.ndarray) -> list[list[int]]:
    """The runs of labelled tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels.astype(np.int8), [0]])))
    return [ids[a:b].tolist() for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain", "sentencepiece", "chatml"])
def test_labels_are_exactly_the_answers_and_their_ends(
    tokenizer: Tokenizer, chatml: Tokenizer, pieces: Tokenizer, name: str, turns: int
) -> None:
    used = {"plain": tokenizer, "sentencepiece": pieces, "chatml": chatml}[name]
    template = template_of("chat" if name == "chatml" else "plain", used, SYSTEM)
    talk = Conversation(TALK.turns[:turns])
    ((ids, labels),) = encode([template.parts(talk)], used)
    runs = answers(ids, labels)
    assert [used.decode(run[:-1]) for run in runs] == [turn.answer for turn in talk.turns]
    assert all(run[-1] == used.eot_id and used.eot_id not in run[:-1] for run in runs)
    asked = used.decode(ids[~labels].tolist())
    for turn in talk.turns:
        assert turn.question in asked
    assert SYSTEM in asked


def test_the_plain_template_is_that_of_the_documents(pieces: Tokenizer) -> None:
    template = template_of("plain", pieces, SYSTEM)
    parts = template.parts(Conversation((Turn("q?", "a."),)))
    prompt = "[SYSTEM]\nBe brief.\n[USER]\nq?\n[ASSISTANT]\n"
    assert [part.text for part in parts] == ["", prompt, "a.", ""]
    bos = pieces.processor.bos_id()  # type: ignore[attr-defined]
    assert [part.id for part in parts] == [bos, None, None, pieces.eot_id]
    given = template.parts(Conversation((Turn("q?", "a."),), system="S"))
    assert given[1].text.startswith("[SYSTEM]\nS\n[USER]")


def test_an_answer_of_weight_nothing_is_read_but_not_learned(
    tokenizer: Tokenizer, chatml: Tokenizer
) -> None:
    both = (Turn("q", "first"), Turn("r", "second"))
    one = (Turn("q", "first", weight=0.0), both[1])
    for name, used in (("plain", tokenizer), ("chat", chatml)):
        template = template_of(name, used, SYSTEM)
        encoded = encode([template.parts(Conversation(turns)) for turns in (one, both)], used)
        assert np.array_equal(encoded[0][0], encoded[1][0])
        assert [used.decode(run) for run in answers(*encoded[0])] == ["second"]


def test_a_chat_is_tokenized_as_transformers_does(chatml: Tokenizer, chatml_folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(chatml_folder)
    talk = Conversation(
        (TALK.turns[0], Turn("how is 42 ok?", "why is the disk 7 ok")), system=SYSTEM
    )
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in talk.turns:
        messages += [
            {"role": "user", "content": turn.question},
            {"role": "assistant", "content": turn.answer},
        ]
    template = template_of("chat", chatml, "")
    ((ids, _),) = encode([template.parts(talk)], chatml)
    whole = theirs.apply_chat_template(messages, return_dict=False)
    assert whole[: len(ids)] == ids.tolist()
    assert theirs.decode(whole[len(ids) :]) == "\n"  # what the template adds after the last end
    prompt = prompt_ids(
        template, chatml, talk.turns[1].question, turns=talk.turns[:1], system=SYSTEM
    )
    assert prompt == theirs.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_prompt_is_the_beginning_of_its_example(
    tokenizer: Tokenizer, chatml: Tokenizer, name: str
) -> None:
    used = tokenizer if name == "plain" else chatml
    template = template_of(name, used, SYSTEM)
    ((ids, labels),) = encode([template.parts(TALK)], used)
    last = len(ids) - len(answers(ids, labels)[-1])
    asked = prompt_ids(template, used, TALK.turns[-1].question, turns=TALK.turns[:-1])
    assert asked == ids[:last].tolist()


def test_a_template_without_an_end_gets_ours(tokenizer: Tokenizer) -> None:
    template = template_of("chat", tokenizer, "")  # "Question: ...\nAnswer: ..."
    ((ids, labels),) = encode([template.parts(Conversation((Turn("q", "a 7"),)))], tokenizer)
    assert tokenizer.decode(ids.tolist()) == "Question: q\nAnswer: a 7"
    assert tokenizer.decode(ids[labels].tolist()) == " a 7"
    assert ids[-1] == tokenizer.eot_id
    assert labels[-1]


def with_template(tokenizer: HuggingFaceTokenizer, template: str) -> HuggingFaceTokenizer:
    other = HuggingFaceTokenizer(tokenizer.backend, {"eos_token": "<|im_end|>"}, "here")
    other.config["chat_template"] = template
    return other


@pytest.mark.parametrize(
    "template",
    [
        # Earlier answers lose their text when there is a later one.
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}-"
        "{% endif %}<|im_end|>{% endfor %}",
        # What stands before the answer is not what a generation begins with.
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}go{% endif %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_without_exact_labels_is_refused(
    chatml: HuggingFaceTokenizer, template: str
) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        template_of("chat", with_template(chatml, template), "")


def test_a_template_that_trims_is_followed_and_one_that_changes_text_is_not(
    chatml: HuggingFaceTokenizer,
) -> None:
    trims = template_of("chat", with_template(chatml, CHATML_WITH.format("|trim")), "")
    ((ids, labels),) = encode([trims.parts(Conversation((Turn(" q ", " a\n"),)))], chatml)
    assert chatml.decode(ids[labels].tolist()) == "a"
    with pytest.raises(ConfigError, match="changes the text"):
        template_of("chat", with_template(chatml, CHATML_WITH.format("|upper")), "")
    changes = with_template(chatml, CHATML_WITH.format("|replace('7', '8')"))
    some = template_of("chat", changes, "")
    some.parts(Conversation((Turn("q 6", "a"),)))
    with pytest.raises(ValueError, match="changes the text"):
        some.parts(Conversation((Turn("q 7", "a"),)))


CHATML_WITH = (
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content{} }}}}<|im_end|>\n"
    "{{% endfor %}}{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)


def test_sentencepiece_has_no_chat_template(pieces: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.template=plain"):
        template_of("chat", pieces, "")


# ------------------------------------------------------------------------------------- length


def test_what_fits_is_left_alone_and_what_does_not_is_cut_as_said() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        spans = [int(n) for n in rng.integers(1, 30, 2 * rng.integers(1, 4))]
        labels = np.concatenate([np.full(n, i % 2 == 1) for i, n in enumerate(spans)])
        ids = np.arange(len(labels))
        limit, header, first = (
            int(rng.integers(2, 60)),
            int(rng.integers(0, 6)),
            int(rng.integers(0, 2)),
        )
        got = fit(ids, labels, limit, header, first)
        if got is None:
            assert len(ids) > limit
            assert max(limit - spans[1], limit // 2) < first + header
            seen.add("none")
            continue
        assert len(got.ids) <= limit
        assert got.labels.any()
        assert got.labels[-1]
        assert np.array_equal(labels[got.ids], got.labels)  # every token kept its own label
        assert got.ids[0] == 0 or not first
        prompt = int(np.argmax(got.labels))
        assert got.prompt_cut == (prompt < spans[0])
        if got.prompt_cut:
            assert prompt == max(limit - spans[1], limit // 2)
            kept = got.ids[prompt - header : prompt].tolist()
            assert kept == list(range(spans[0] - header, spans[0]))
        lost = set(ids[labels]) - set(got.ids[got.labels])
        whole = [set(range(sum(spans[:i]), sum(spans[: i + 1]))) for i in range(1, len(spans), 2)]
        assert got.answers_dropped == sum(answer <= lost for answer in whole)
        assert got.answer_shortened == any(lost & a and not a <= lost for a in whole)
        seen |= {"cut"} if got.prompt_cut else set()
        seen |= {"short"} if got.answer_shortened else set()
        seen |= {"dropped"} if got.answers_dropped else set()
    assert seen == {"none", "cut", "short", "dropped"}
