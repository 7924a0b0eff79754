"""Models and tokenizers by their name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thimble.errors import EnvironmentProblem


def fetch(name: str, what: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of ``name`` that match, fetched where they are not here yet.

    ``what`` is wanted of it: model, tokenizer. Raises EnvironmentProblem when the hub does not give
    it, with what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise EnvironmentProblem(
            f"{name} is given only to those who accepted its licence. Accept it at "
            f"https://huggingface.co/{name}, then log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise EnvironmentProblem(
            f"The hub knows no {name}, or does not show it to you. Is the name right? For a "
            "private one log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"There is no folder {name}, and the {what} of that name could not be fetched from the "
            f"Hugging Face hub: {reason}"
        ) from error
