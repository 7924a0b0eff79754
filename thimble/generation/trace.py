"""What a model had in mind at each token: the likeliest ones with their probabilities."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from thimble.generation.sampling import log_weights
from thimble.tokens.tokenizer import Tokenizer

SHOWN = 5
HEADER = f"{'token':<18} {'probability':>11} {'steps':>5}   likeliest"


@dataclass(frozen=True)
class Token:
    """A generated token. ``probability`` and those of ``top``, the five likeliest, are of the
    cross-entropy that the model was trained with, before temperature, top-k and top-p; ``steps``:
    the supervision steps thought for it, None for a model whose stack runs once."""

    id: int
    text: str
    probability: float
    top: tuple[tuple[str, float], ...]
    steps: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """It and its rivals under ``HEADER``, in columns."""
        steps = "" if self.steps is None else str(self.steps)
        rivals = "  ".join(f"{text!r} {value:.4f}" for text, value in self.top)
        return f"{self.text!r:<18} {self.probability:11.4f} {steps:>5}   {rivals}"


class Names:
    """How single tokens of a tokenizer are shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.raw = {index: token for token, index in tokenizer.vocabulary().items()}

    def __call__(self, index: int) -> str:
        """Its text; of special tokens and parts of characters the vocabulary's name."""
        text, raw = self.tokenizer.decode([index]), self.raw.get(index, f"<{index}>")
        if raw.startswith("▁") and not text.startswith(" "):
            text = f" {text}"  # which a SentencePiece model drops at the beginning of a text
        return raw if not text or "\ufffd" in text else text

    def token(self, logits_v: Tensor, chosen: int, steps: int | None, form: str) -> Token:
        """``logits_v`` [V]: what ``chosen`` was chosen from."""
        probabilities = log_weights(logits_v, form).softmax(-1)
        best = probabilities.topk(min(SHOWN, len(probabilities)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple((self(index), value) for index, value in pairs)
        return Token(chosen, self(chosen), float(probabilities[chosen]), top, steps)
