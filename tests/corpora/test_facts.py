"""Every wording of a question that makes a fact gives the same fact back."""

from __future__ import annotations

from thimble.corpora import questions
from thimble.corpora.extract.ids import Vendor
from thimble.corpora.facts import COMMAND, DRIVER, HARDWARE, INSTALLATION, Fact, fact_of
from thimble.corpora.questions import Question


def every_wording(monkeypatch, make) -> list[Question]:
    """All questions of a maker, not only those its hash picks."""
    monkeypatch.setattr(questions, "pick", lambda key, count, of: list(range(of)))
    monkeypatch.setattr(
        questions,
        "ask",
        lambda group, wordings, count=1: (Question((pair,), group) for pair in wordings),
    )
    return list(make())


def facts(asked: list[Question]) -> list[Fact]:
    found = [fact_of(question.text(), question.group) for question in asked]
    return [fact for fact in found if fact]


def test_devices(monkeypatch) -> None:
    vendor = Vendor("8086", "Intel Corp.", [("1533", "I210 Gigabit by the dozen")])
    asked = every_wording(monkeypatch, lambda: questions.of_vendor(vendor, "PCI"))
    found = facts(asked)
    assert len(found) == 4  # of five wordings; one runs vendor and device together
    assert len({fact.key for fact in found}) == 1
    (answer,) = {fact.answer for fact in found}
    assert answer == " I210 Gigabit by the dozen by Intel Corp.."
    fact = found[0]
    assert (fact.skill, fact.proof) == (HARDWARE, "I210 Gigabit by the dozen")
    assert fact.prompt.endswith("Answer: 8086:1533 is the")
    assert fact.prompt + fact.answer == asked[3].text()  # as it stands in a corpus


def test_bindings_and_drivers(monkeypatch) -> None:
    asked = every_wording(
        monkeypatch, lambda: questions.of_binding("Acme DMA controller", "", ["acme,dma"])
    )
    (fact,) = facts(asked)
    assert (fact.skill, fact.key, fact.proof) == (DRIVER, "binding:acme,dma", "acme,dma")
    assert fact.answer == " Acme DMA controller."
    assert fact.proof in "properties:\n  compatible:\n    const: acme,dma\n"  # the binding itself
    asked = every_wording(
        monkeypatch,
        lambda: questions.of_driver("drivers/dma/acme.c", "Acme DMA driver", ["acme,dma"]),
    )
    found = facts(asked)
    assert len(found) == 2
    assert {fact.key for fact in found} == {"driver-for:acme,dma"}
    assert {fact.answer for fact in found} == {" drivers/dma/acme.c of the Linux source."}


def test_commands(monkeypatch) -> None:
    def asked(section: str) -> list[Question]:
        return every_wording(
            monkeypatch,
            lambda: questions.of_manual_page(["lsblk"], section, "list block devices.", "Linux"),
        )

    found = facts(asked("8"))
    assert {fact.key for fact in found} == {"man:Linux:lsblk(8)"}
    assert {fact.prompt for fact in found} == {
        "Question: Which Linux administration command is described as: list block devices?\nAnswer:"
    }
    assert {fact.answer for fact in found} == {" lsblk(8)."}
    assert found[0].skill == COMMAND
    assert not facts(asked("3"))  # a library function is no command


def test_packages(monkeypatch) -> None:
    asked = every_wording(
        monkeypatch, lambda: questions.of_package("mdadm", "tool for RAID arrays", "admin")
    )
    found = facts(asked)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert found[0].skill == INSTALLATION
    assert found[0].answer == " mdadm. Install it with `apt install mdadm`."


def test_other_text_is_no_fact() -> None:
    assert fact_of("Question: What is this?\nAnswer: A text.", "package:x") is None
    assert fact_of("Question: What is this?\nAnswer: A text.", "kconfig:X") is None
    assert fact_of("no question", "") is None
