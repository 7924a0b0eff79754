"""The whole way in one go: real text, tokens, a small model, the gate, a sample.

Every stage is kept, so a second call finds it done, and one that was interrupted goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thimble import api
from thimble.console import log

if TYPE_CHECKING:
    from rich.console import Console

    from thimble.config.schema import Config
    from thimble.evaluation.acceptance import Acceptance

RECIPE = "slm_nano"
QUESTION = "What does the command mount do?"
PROMPT = "The kernel module"


@dataclass(frozen=True)
class Quickstart:
    """``new`` says whether a model was trained now, or found from an earlier call."""

    run: Path
    new: bool
    acceptance: Acceptance
    answer: str
    text: str

    @property
    def accepted(self) -> bool:
        return self.acceptance.accepted

    def render(self, console: Console) -> None:
        """The gate's tables, two samples, and what to try next."""
        from rich.text import Text

        self.acceptance.render(console)
        question = f"Question: {QUESTION}\nAnswer:"
        for asked, given in ((question, f" {self.answer}"), (PROMPT, self.text)):
            console.print()
            console.print(Text(asked, "bold").append(given, "not bold"))
        console.print()
        console.print(f"The run, with its records and checkpoints: {self.run}")
        console.print(f"To look at: thimble report {self.run}")
        console.print(f'Next: thimble generate {self.run} --prompt "The kernel module"')
        console.print(
            "      thimble corpus build --from YOUR_FOLDER   the same with text of your own"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "new": self.new,
            "question": QUESTION,
            "answer": self.answer,
            "prompt": PROMPT,
            "text": self.text,
            "acceptance": self.acceptance.to_dict(),
        }


def quickstart(*overrides: str) -> Quickstart:
    """Build the quick corpus and its tokens, train ``slm_nano``, judge it and let it speak.

    ``overrides`` are those of ``thimble train``. Raises what the stages raise; nothing that was
    done before is lost then.
    """
    from thimble.config.load import load
    from thimble.evaluation import acceptance

    config = load(RECIPE, overrides)
    log.info("1 of 4: text")
    corpus = api.build_corpus("os_kernel", scale="quick")
    log.info("2 of 4: tokens")
    tokens = api.build_tokens(corpus, output=config.data.path, vocab_size=config.model.vocab_size)
    log.info("3 of 4: training")
    run, finished = existing_run(config, tokens)
    if run is None:
        run = api.train(RECIPE, *overrides).path
    elif finished:
        log.info("%s is trained already.", run)
    else:
        run = api.train(resume=run).path
    log.info("4 of 4: judgement")
    result = acceptance.stored(run) or api.accept(run)
    model = api.load(run)
    answer = model.generate(message=QUESTION, max_tokens=60)
    text = model.generate(PROMPT, max_tokens=100)
    return Quickstart(run, not finished, result, answer.strip(), text)


def existing_run(config: Config, tokens: Path) -> tuple[Path | None, bool]:
    """The newest run of this very configuration on these tokens, and whether it is finished.

    A run without a checkpoint has nothing to go on from and does not count.
    """
    from thimble import artifacts
    from thimble.config.load import load_run
    from thimble.errors import ThimbleError
    from thimble.training.run import RunFolder

    wanted = artifacts.read_manifest(tokens, "tokens", make="thimble tokens build")["fingerprint"]
    for path in sorted((Path(config.output_dir) / config.recipe).glob("*"), reverse=True):
        folder = RunFolder(path)
        latest = folder.pointed("latest")
        try:
            if latest is None or load_run(path) != config:
                continue
            cursor = artifacts.read_json(latest / "data_cursor.json")
        except ThimbleError:
            continue  # of another version, or not a run; a new one is made beside it
        if cursor["tokens"] == wanted:
            events = [record["event"] for record in folder.records() if "event" in record]
            return path, bool(events) and events[-1] == "finished"
    return None, False
