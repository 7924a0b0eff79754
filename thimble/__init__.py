"""Train, distil and instruction-tune small language models, and show that what came out is real.

The functions of ``thimble.api`` are available here; they are imported at first use, so that
``import thimble`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thimble.api import (
        accept,
        build_conversations,
        build_corpus,
        build_tokens,
        evaluate,
        export_gguf,
        export_onnx,
        load,
        plan,
        quantize,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "accept",
    "build_conversations",
    "build_corpus",
    "build_tokens",
    "evaluate",
    "export_gguf",
    "export_onnx",
    "load",
    "plan",
    "quantize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from thimble import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
