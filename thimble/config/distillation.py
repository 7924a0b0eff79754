"""What a model is trained to do, from whom a student learns, and where its run counts as stuck."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from thimble.config.section import Fraction, Section


class ObjectiveConfig(Section):
    """What the model is trained to do."""

    name: Literal["next_token", "distill", "act"] = Field(
        default="next_token",
        description="The loss. distill: the teacher's distribution beside the next token; act: "
        "deep supervision with halting, of recursive models.",
    )
    form: Literal["softmax", "stablemax"] = Field(
        default="softmax", description="With act: what makes probabilities of logits."
    )
    per_sequence: bool = Field(
        default=False,
        description="With act: the mean over each example's tokens first, as the papers have it, "
        "instead of over all tokens.",
    )
    distill_alpha: Fraction = Field(
        default=0.2,
        description="With distill: weight of the next token's cross-entropy; the teacher has the "
        "rest.",
    )
    distill_alpha_start: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="With distill: the weight at the beginning; null: no other.",
    )
    alpha_warmup_steps: int | None = Field(
        default=None,
        ge=1,
        description="With distill: steps from distill_alpha_start to distill_alpha; null: the run.",
    )
    temperature: float = Field(
        default=2.0,
        gt=0,
        le=100,
        description="With distill: what teacher's and student's logits are divided by.",
    )
    temperature_start: float | None = Field(
        default=None,
        gt=0,
        le=100,
        description="With distill: the temperature at the beginning; null: no other.",
    )
    temperature_warmup_steps: int | None = Field(
        default=None,
        ge=1,
        description="With distill: steps from temperature_start to temperature, in nine levels, so "
        "that a cache can know the teacher at each; null: the run.",
    )
    divergence: Literal["forward", "reverse"] = Field(
        default="forward",
        description="With distill: KL(teacher, student), which covers all the teacher may say, or "
        "KL(student, teacher), which keeps to what it surely says.",
    )
    reverse_warmup_steps: int = Field(
        default=0,
        ge=0,
        description="With distill and divergence=reverse: steps of the forward one before it.",
    )


class TeacherConfig(Section):
    """Who a student learns from (objective.name=distill), and how it is asked."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="Run, checkpoint, folder of transformers or name on the hub; of a served one "
        "its name there. With a cache: whose it has to be, and who evaluations ask; null: any.",
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="PEFT adapter that is added to it; null: none."
    )
    mode: Literal["direct", "cached", "served"] = Field(
        default="direct",
        description="direct: loaded beside the student; cached: asked before, by `thimble teacher "
        "cache` or cache_logits; served: by a server like vLLM's.",
    )
    topk: int = Field(
        default=512,
        ge=1,
        description="Likeliest tokens of each position that are told apart; at most all.",
    )
    sampled: bool = Field(
        default=False,
        description="As many draws instead of the likeliest tokens: the whole distribution on "
        "average.",
    )
    cache: str | None = Field(
        default=None, min_length=1, description="Folder of what the teacher said."
    )
    cache_logits: bool = Field(
        default=False,
        description="Keep what a direct or served teacher says in teacher.cache, and ask no row "
        "twice.",
    )
    url: str | None = Field(
        default=None, min_length=1, description="Where it is served, as in http://localhost:8000."
    )


class SaddleConfig(Section):
    """When a run counts as stuck at a saddle, and whether something is done about it.

    Everything is relative to the run itself, so nothing here depends on model or vocabulary.
    """

    interventions: bool = Field(
        default=False,
        description="Raise the learning rate for a while at a saddle; false: only tell of it.",
    )
    patience: int = Field(
        default=150, ge=1, description="Steps over which the loss has to have stood still."
    )
    min_improvement: float = Field(
        default=0.005,
        gt=0,
        lt=1,
        description="Falling by less than this fraction of the run's whole fall is standing still.",
    )
    grad_norm_ratio: float = Field(
        default=0.5,
        gt=0,
        description="A gradient norm below this fraction of the run's steep steps is gentle.",
    )
    finished: Fraction = Field(
        default=0.9,
        description="A loss that has fallen by this fraction of the first one is at its end.",
    )
    escape: float = Field(
        default=0.01, gt=0, lt=1, description="Fall, as a fraction, after which it has been left."
    )
    cooldown: int = Field(
        default=250, ge=0, description="Steps after one in which no other is looked for."
    )


def check_teacher(objective: ObjectiveConfig, teacher: TeacherConfig) -> None:
    """Raises ValueError when this teacher cannot be asked for what this objective needs."""
    needed = {"direct": "path", "cached": "cache", "served": "url"}[teacher.mode]
    if getattr(teacher, needed) is None:
        raise ValueError(
            f"There is no teacher to learn from: teacher.mode={teacher.mode} needs "
            f"teacher.{needed}. For example:\n  teacher.{needed}="
            + {"path": "runs/slm_nano/...", "cache": "data/teacher_cache/..."}.get(
                needed, "http://localhost:8000"
            )
        )
    if teacher.cache_logits and (teacher.cache is None or teacher.mode == "cached"):
        raise ValueError(
            "teacher.cache_logits keeps what a teacher says that is asked, in teacher.cache. "
            "Use:\n  teacher.mode=direct teacher.cache=data/teacher_cache/NAME"
        )
    start = objective.temperature_start
    moves = start is not None and start != objective.temperature
    if teacher.sampled and (moves or objective.divergence == "reverse"):
        raise ValueError(
            "Draws from a teacher (teacher.sampled) are of one temperature and estimate the "
            "forward divergence only. Use one of:\n  teacher.sampled=false\n"
            "  objective.temperature_start=null objective.divergence=forward"
        )
    if teacher.mode == "served" and (teacher.sampled or moves or objective.temperature != 1):
        raise ValueError(
            "A served teacher tells its likeliest tokens at temperature 1 only. Use:\n"
            "  objective.temperature=1 objective.temperature_start=null teacher.sampled=false"
        )
