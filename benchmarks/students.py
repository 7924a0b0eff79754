"""What a student's claims are worth, on real text and two cores, each beside its rival.

    python benchmarks/students.py distilled       # the teacher, or the next token alone
    python benchmarks/students.py teacher_start   # beginning with its weights, or with drawn ones
    python benchmarks/students.py finetuned       # a teacher made used to the data, or as it was
    python benchmarks/students.py recursive       # retnet_hrm, or retention that runs once
    python benchmarks/students.py document        # the page again, from the figures that are there

`key=value` changes the recipe for every contestant of a part, `--steps` how long they train,
`--seeds` how often. Runs lie in `runs/students`; one that is there with the same configuration is
not trained again, one that was interrupted goes on. Figures are kept in
`docs/results/students.json`; the page `docs/results/students.md` and its curves are made of them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from students_page import write_page

from thimble import api, artifacts, console
from thimble.compare import is_finished
from thimble.config.load import load, load_run
from thimble.config.schema import Config
from thimble.console import log
from thimble.errors import ThimbleError
from thimble.evaluation import agreement
from thimble.evaluation.perplexity import evaluate_split
from thimble.generation.model import load as load_model
from thimble.models.retention import document_starts
from thimble.teachers.asked import Asked
from thimble.teachers.direct import open_direct
from thimble.teachers.examples import open_examples
from thimble.teachers.models import find
from thimble.tokens.shards import SPLITS, SplitWriter, TokenSplit
from thimble.training.data import open_data, ready
from thimble.training.devices import describe, resolve_device
from thimble.training.distributed import Processes
from thimble.training.loop import Trainer
from thimble.training.run import RunFolder

RECIPE = "distill_nano"
# What the small teacher learned, and what its students are for.
KINDS = ("os_code", "administration")
TOLD_APART = 512  # of the teacher's likeliest tokens; the rest of its distribution is one bucket
WITHOUT = "objective.name=next_token"


@dataclass
class Settings:
    part: str
    seeds: int
    steps: int
    eval_every: int
    eval_tokens: int
    test_tokens: int | None
    teacher: Path
    runs: Path
    output: Path
    finetune: dict[str, Any]
    overrides: list[str] = field(default_factory=list)

    def home(self, arm: str, seed: int) -> Path:
        name = "".join(c if c.isalnum() else "_" for c in arm)
        return self.runs / self.part / f"{name}-{seed}"

    def words(self, seed: int, *more: str) -> list[str]:
        """The overrides of a run; the part's own come last but for those of one contestant."""
        return [
            f"teacher.path={self.teacher}",
            f"seed={seed}",
            f"training.max_steps={self.steps}",
            f"training.eval_every={self.eval_every}",
            f"training.save_every={self.steps}",
            f"evaluation.max_tokens={self.eval_tokens}",
            "evaluation.sample_tokens=1",
            f"guards.plateau_steps={self.steps}",
            *self.overrides,
            *more,
        ]


# ------------------------------------------------------------------------------- runs and figures


def trained(home: Path, words: list[str], recipe: str = RECIPE) -> RunFolder:
    """The finished run of these words: found in a folder, gone on with, or made."""
    words = [*words, f"output_dir={home}"]
    wanted = ready(load(recipe, words))
    for path in sorted(home.glob("*/*"), reverse=True):
        if same(path, wanted):
            run = RunFolder(path)
            if not is_finished(run):
                log.info("%s: going on with %s", home, path)
                api.train(resume=path)
            return run
    log.info("%s: training", home)
    return RunFolder(api.train(recipe, *words).path)


def same(path: Path, wanted: Config) -> bool:
    try:
        return load_run(path) == wanted
    except ThimbleError:
        return False  # of another version, or cut off when it began


class Measured:
    """Held-out figures of students beside a teacher."""

    def __init__(self, tokens: str | Path, teacher: Path, length: int, most: int | None) -> None:
        self.data, self.length, self.most = TokenSplit(tokens, "test"), length, most
        self.device = resolve_device("auto")
        examples = open_examples(tokens, "test", length)
        asked = Asked(min(TOLD_APART, examples.vocab_size))
        self.teacher = open_direct(teacher, examples, asked, device=self.device)

    def figures(self, folder: Path) -> dict[str, Any]:
        model = load_model(folder, str(self.device))
        network, end = model.network, self.data.eot_id

        def scores(inputs: Any, targets: Any) -> Any:
            said: Any = self.teacher.targets(range(len(inputs)), inputs)
            hidden = network.hidden(inputs, starts_bt=document_starts(model.config, inputs, end))
            return agreement.position_scores(hidden, network.head.weight, targets, said)

        found = evaluate_split(
            scores, self.data, self.length, 16, self.most, device=self.device,
            beside=agreement.names(teacher=True),
        )  # fmt: skip
        return {
            "bits_per_byte": found["bits_per_byte"],
            "nats": found["loss"],
            "agreement": found["teacher_agreement"],
            "kl": found["teacher_kl"],
            "calibration": agreement.calibration_error(found),
            "parameters": network.num_parameters(),
            "tokens": found["tokens"],
        }


def facts(arm: str, seed: int, run: RunFolder) -> dict[str, Any]:
    """What the page needs of a run's records."""
    records = run.records()
    last = [record for record in records if "loss" in record][-1]
    return {
        "arm": arm,
        "seed": seed,
        "run": str(run.path),
        "steps": last["step"],
        "minutes": last["seconds"] / 60,
        "curve": [[r["step"], r["val_loss"]] for r in records if "val_loss" in r],
    }


class Kept:
    """``students.json``: what each part found, written after every run."""

    def __init__(self, settings: Settings) -> None:
        self.path, self.settings = settings.output / "students.json", settings
        self.all: dict[str, Any] = artifacts.read_json(self.path) if self.path.is_file() else {}
        self.part: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/students.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{describe(resolve_device('auto'))}, {platform.system()}",
            "versions": artifacts.versions("torch", "transformers"),
            "load": os.getloadavg()[2],
            "steps": settings.steps,
            "teacher": str(settings.teacher),
            "test_tokens": settings.test_tokens,
            "told_apart": TOLD_APART,
            "overrides": settings.overrides,
            "rows": [],
        }
        before = self.all.get(settings.part, {"rows": []})
        alike = all(
            before.get(k) == self.part[k]
            for k in ("teacher", "test_tokens", "told_apart", "versions")
        )
        self.measured = {row["run"]: row for row in before["rows"]} if alike else {}

    def add(
        self, arm: str, seed: int, run: RunFolder, measured: Measured | None = None, **more: Any
    ) -> None:
        """A finished run; what was measured of it before is not measured again."""
        row = facts(arm, seed, run)
        if measured is not None:
            known, checkpoint = self.measured.get(str(run.path)), run.pointed("latest")
            assert checkpoint is not None
            row = {**known, **row} if known else {**row, **measured.figures(checkpoint)}
        log.info("%s, seed %d: %s", arm, seed, {k: v for k, v in row.items() if k != "curve"})
        self.part["rows"].append({**row, **more})
        self.write()

    def write(self, **more: Any) -> None:
        self.part.update(more)
        self.all[self.settings.part] = self.part
        self.path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(self.path, self.all)
        write_page(self.all, self.path.parent)


# ------------------------------------------------------------------------------------- the parts


def distilled(settings: Settings, kept: Kept) -> None:
    arms = {"distilled": (), "without a teacher": (WITHOUT,)}
    config = load(RECIPE, settings.words(1))
    measured = Measured(
        config.data.folder, settings.teacher, config.training.sequence_length, settings.test_tokens
    )
    kept.write(of_teacher=measured.figures(settings.teacher), objective=objective(config))
    for seed in range(1, settings.seeds + 1):
        for arm, words in arms.items():
            run = trained(settings.home(arm, seed), settings.words(seed, *words))
            kept.add(arm, seed, run, measured)


def teacher_start(settings: Settings, kept: Kept) -> None:
    ways = {"distilled": (), "next token": (WITHOUT,)}
    begins = {"drawn weights": (), "the teacher's weights": ("training.init_from_teacher=true",)}
    kept.write(
        first={name: first_loss(settings.words(1, WITHOUT, *own)) for name, own in begins.items()}
    )
    for seed in range(1, settings.seeds + 1):
        for (way, words), (name, own) in itertools.product(ways.items(), begins.items()):
            arm = f"{way}, {name}"
            run = trained(settings.home(arm, seed), settings.words(seed, *words, *own))
            kept.add(arm, seed, run)


def first_loss(words: list[str]) -> float:
    """Held-out loss before the first step."""
    config = ready(load(RECIPE, words))
    trainer = Trainer(config, open_data(config), resolve_device("auto"), Processes())
    return trainer.task.evaluate()["val_loss"]


def finetuned(settings: Settings, kept: Kept) -> None:
    known, new = KINDS
    config = load(RECIPE, settings.words(1))
    theirs, ours = (of_kind(Path(config.data.folder), kind) for kind in KINDS)
    words = [f"data.path={theirs}", "guards.plateau_steps=640", "training.eval_every=320"]
    base = trained(settings.home("teacher", 1), words, "slm_nano")
    base_folder = base.pointed("latest")
    assert base_folder is not None
    slug = artifacts.fingerprint([settings.finetune, str(base_folder)])[:8]
    output = settings.runs / settings.part / "lora" / slug
    result = output / "finetune.json"
    if not result.is_file():
        api.finetune_teacher(
            base_folder,
            ours,
            output=output,
            sequence_length=config.training.sequence_length,
            resume="auto" if (output / "checkpoints").exists() else None,
            **settings.finetune,
        )
    tuned = artifacts.read_json(result)
    kept.write(
        kinds={"known": known, "new": new, **counts(ours)},
        finetuning={
            name: tuned[name]
            for name in ("steps", "tokens", "seconds", "base_perplexity", "perplexity", "options")
        },
        teacher_minutes=facts("teacher", 1, base)["minutes"],
        teacher=str(base_folder),
    )
    data = f"data.path={ours}"
    arms = {
        "teacher as it was": (data, f"teacher.path={base_folder}"),
        "fine-tuned teacher": (data, f"teacher.path={tuned['merged']}"),
        "without a teacher": (data, f"teacher.path={base_folder}", WITHOUT),
    }
    for seed in range(1, settings.seeds + 1):
        for arm, words_of_arm in arms.items():
            run = trained(settings.home(arm, seed), settings.words(seed, *words_of_arm))
            kept.add(arm, seed, run)


def of_kind(source: Path, kind: str) -> Path:
    """The documents of one category of a tokens folder, as a tokens folder of its own."""
    output = source.parent / f"{source.name}-{kind}"
    whole = artifacts.read_manifest(source, "tokens", make="thimble tokens build")
    inputs = {"tokens": whole["fingerprint"]}
    if output.is_dir():
        there = artifacts.read_manifest(output, "tokens", make="this command, without the folder")
        if there["inputs"] == inputs:
            return output
        raise SystemExit(f"{output} is of other tokens. Remove it to make it again.")
    with artifacts.atomic_directory(output) as temporary:
        kept: dict[str, Any] = {}
        for split in SPLITS:
            data = TokenSplit(source, split)
            table = data.documents.filter(
                np.asarray(data.documents.column("category").to_pylist()) == kind
            )
            columns: dict[str, Any] = {
                name: table.column(name).to_pylist() for name in ("id", "source", "category")
            }
            columns |= {name: table.column(name).to_numpy() for name in ("tokens", "bytes")}
            spans = zip(table.column("start").to_numpy(), columns["tokens"], strict=True)
            with SplitWriter(temporary, split, data.dtype) as writer:
                ids = np.concatenate([data.tokens[at : at + size] for at, size in spans])
                writer.append(ids, columns)
                kept[split] = writer.counts
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (temporary / name).write_bytes((source / name).read_bytes())
        artifacts.write_manifest(
            temporary,
            "tokens",
            inputs=inputs,
            options={"category": kind},
            counts=kept,
            packages=("numpy", "pyarrow"),
            **{key: whole[key] for key in ("dtype", "vocab_size", "eot_id", "pad_id", "tokenizer")},
        )
    return output


def counts(tokens: Path) -> dict[str, int]:
    manifest = artifacts.read_manifest(tokens, "tokens", make="thimble tokens build")
    return {split: manifest["counts"][split]["tokens"] for split in SPLITS}


def recursive(settings: Settings, kept: Kept) -> None:
    for seed in range(1, settings.seeds + 1):
        home = settings.home("recursive", seed)
        words = settings.words(seed, "model=retnet_hrm", f"output_dir={home}")
        wanted = ready(load(RECIPE, words))
        there = [path for path in sorted(home.glob("*/*")) if same(path, wanted)]
        found = api.compare(run=there[-1]) if there else api.compare(RECIPE, *words)
        config = load_run(found.run)
        kept.write(objective=objective(config))
        measured = Measured(
            config.data.folder,
            settings.teacher,
            config.training.sequence_length,
            settings.test_tokens,
        )
        for contestant in found.rows:
            shape = {"layers": contestant.layers, "flops": contestant.flops}
            kept.add(contestant.name, seed, RunFolder(contestant.run), measured, **shape)


PARTS = {part.__name__: part for part in (distilled, teacher_start, finetuned, recursive)}
# Steps and how often held-out text is looked at: curves need more of it.
STEPS = {"distilled": (640, 160), "recursive": (300, 100)}
CURVES = (300, 15)


def objective(config: Config) -> dict[str, Any]:
    return {
        "alpha": config.objective.distill_alpha,
        "temperature": config.objective.temperature,
        "topk": config.teacher.topk,
        "learning_rate": config.optim.learning_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*PARTS, "document"])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every student")
    parser.add_argument("--eval-every", type=int)
    parser.add_argument("--eval-tokens", type=int, help="held-out tokens of each look")
    parser.add_argument("--test-tokens", type=int, help="of the test split; default: all")
    parser.add_argument("--teacher", default="runs/slm_nano", help="run, or folder of runs")
    parser.add_argument("--finetune-steps", type=int, default=300)
    parser.add_argument("--finetune-rate", type=float, default=2e-3)
    parser.add_argument("--runs", type=Path, default=Path("runs/students"))
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_intermixed_args()
    console.setup(0)
    if options.part == "document":
        write_page(artifacts.read_json(options.output / "students.json"), options.output)
        print(options.output / "students.md")
        return
    steps, every = STEPS.get(options.part, CURVES)
    settings = Settings(
        part=options.part,
        seeds=options.seeds,
        steps=options.steps or steps,
        eval_every=options.eval_every or every,
        eval_tokens=options.eval_tokens or (20_000 if options.part not in STEPS else 60_000),
        test_tokens=options.test_tokens,
        teacher=find(options.teacher),
        runs=options.runs,
        output=options.output,
        finetune={
            "rank": 64,
            "max_steps": options.finetune_steps,
            "learning_rate": options.finetune_rate,
            "batch_rows": 16,
            "micro_batch_rows": 16,
            "eval_every": options.finetune_steps,
            "save_every": options.finetune_steps,
        },
        overrides=options.overrides,
    )
    started = time.monotonic()
    PARTS[options.part](settings, Kept(settings))
    print(options.output / "students.md", f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
