"""What a person watches while a model trains: one live panel, or plain lines without a terminal."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

from thimble import console

TICKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 48) -> str:
    """The course of a curve in at most ``width`` characters, each the mean of its part."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(TICKS[min(int((mean - low) / span * 8), 7)] for mean in means)


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Panel:
    """Progress, rate, time left, loss, bits per byte against the baselines, memory, a sample.

    ``baselines`` maps names to bits per byte of the same held-out text; a line is printed when the
    model passes one.
    """

    def __init__(self, title: str, total_steps: int, baselines: dict[str, float]) -> None:
        self.title, self.total = title, total_steps
        self.baselines = dict(sorted(baselines.items(), key=lambda item: -item[1]))
        self.losses: list[float] = []
        self.train: dict[str, Any] = {}
        self.val: dict[str, Any] = {}
        self.sample = ""
        self.passed: set[str] = set()
        self.live: Any = None
        self.last_line = 0.0
        self.started = time.monotonic()
        self.first_step: int | None = None

    def __enter__(self) -> Panel:
        if sys.stderr.isatty() and not console.quiet:
            from rich.console import Console
            from rich.live import Live

            terminal = Console(stderr=True)
            self.live = Live(self, console=terminal, refresh_per_second=4, transient=False)
            self.live.__enter__()
            # Notes go above the panel instead of through it.
            self.handlers = console.log.handlers[:]
            console.log.handlers[:] = [_Above(terminal)]
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*error)
            console.log.handlers[:] = self.handlers
            self.live = None

    def trained(self, record: dict[str, Any]) -> None:
        self.train = record
        self.losses.append(record["loss"])
        if self.first_step is None:
            self.first_step, self.started = record["step"], time.monotonic()
        now = time.monotonic()
        done = record["step"] >= self.total
        if self.live is None and (now - self.last_line >= 5 or done):
            self.last_line = now
            console.log.info(
                "step %d/%d  loss %.3f  lr %.2e  grad %.2f  %s tok/s  %s left",
                record["step"],
                self.total,
                record["loss"],
                record["learning_rate"],
                record["grad_norm"],
                f"{record['tokens_per_second']:,.0f}",
                clock(self.left()),
            )

    def evaluated(self, record: dict[str, Any], sample: str) -> None:
        self.val, self.sample = record, sample
        bits = record.get("val_bits_per_byte")
        if self.live is None:
            figures = "  ".join(self.held_out())
            console.log.info(
                "step %d  val loss %.3f  %s", record["step"], record["val_loss"], figures
            )
        if bits is None:
            return
        for name, value in self.baselines.items():
            if bits < value and name not in self.passed:
                self.passed.add(name)
                console.log.info("step %d  passed the %s (%.3f)", record["step"], name, value)

    def held_out(self) -> list[str]:
        """Figures of the last evaluation, in words."""
        known = (
            ("val_perplexity", "perplexity {:.1f}"),
            ("val_bits_per_byte", "bits per byte {:.3f}"),
            ("val_exact_accuracy", "exact {:.1%}"),
        )
        return [
            text.format(self.val[name]) for name, text in known if self.val.get(name) is not None
        ]

    def left(self) -> float:
        """Seconds to the last step, from the whole session's pace (evaluations included)."""
        step, first = self.train.get("step", 0), self.first_step
        if first is None or step <= first:
            # The first record of a session: what all its steps have taken so far.
            return self.train.get("seconds", 0.0) / max(step, 1) * (self.total - step)
        return (time.monotonic() - self.started) / (step - first) * (self.total - step)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel as Box
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step = self.train.get("step", 0)
        facts = Table.grid(padding=(0, 2))
        if self.train:
            facts.add_row(
                "step",
                f"{step:,} of {self.total:,}",
                f"{self.train['tokens_per_second']:,.0f} tokens/s",
                f"{clock(self.left())} left",
            )
            facts.add_row(
                "loss",
                f"{self.train['loss']:.3f}",
                f"learning rate {self.train['learning_rate']:.1e}",
                f"gradient norm {self.train['grad_norm']:.2f}",
            )
        if self.val:
            memory = f"memory {self.train.get('memory_bytes', 0) / 2**30:.1f} GiB"
            facts.add_row("held out", *self.held_out()[:2], memory)
        body: list[Any] = [ProgressBar(total=self.total, completed=step), facts]
        body.append(Text(sparkline(self.losses), style="cyan"))
        if self.val.get("val_bits_per_byte") is not None and self.baselines:
            body.append(Text(self.race(), style="dim"))
        if self.sample:
            body.append(Text(" ".join(self.sample.split())[:300], style="italic"))
        return Box(Group(*body), title=self.title, title_align="left")

    def race(self) -> str:
        """Which baselines are behind, and which comes next."""
        bits = self.val["val_bits_per_byte"]
        behind = [name for name, value in self.baselines.items() if bits < value]
        ahead = [(name, value) for name, value in self.baselines.items() if bits >= value]
        text = f"passed: {', '.join(behind)}" if behind else "passed: none yet"
        return f"{text}   next: {ahead[0][0]} at {ahead[0][1]:.3f}" if ahead else text


class _Above(console.logging.Handler):
    def __init__(self, terminal: Any) -> None:
        super().__init__()
        self.terminal = terminal
        self.setFormatter(console.Formatter())

    def emit(self, record: Any) -> None:
        self.terminal.print(self.format(record), markup=False, highlight=False)
