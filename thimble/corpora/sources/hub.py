"""The Hugging Face hub: what a data set has at one commit, and its files read as streams.

HF_ENDPOINT, HF_TOKEN (or the token in HF_HOME) and HF_HUB_OFFLINE mean what they mean elsewhere.
"""

from __future__ import annotations

import fnmatch
import http.client
import io
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from thimble.corpora.sources.upstream import retried
from thimble.errors import EnvironmentProblem

PAUSE = 2.0  # seconds before the second attempt
BLOCK = 1 << 23  # bytes of one request
BLOCKS_KEPT = 4  # the ends of a parquet file's columns are asked for again


class Refused(EnvironmentProblem):
    """The hub answers, and says no: asking again, or for other things later, is no use."""


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def open_url(request: urllib.request.Request, timeout: float) -> Any:
    """Open an address of the hub; what no second attempt would mend is ``Refused``."""
    from huggingface_hub import get_token

    if token := get_token():
        # Unredirected: the storage that the hub sends us on to must not get it.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise Refused(
                f"{request.full_url} is refused ({error.code}): set HF_TOKEN to a token that may "
                "read it, or accept the terms of the data set on its page."
            ) from error
        if error.code == 404:
            raise Refused(
                f"{request.full_url} does not exist (404). Is HF_ENDPOINT right?"
            ) from error
        raise


@dataclass(frozen=True)
class Snapshot:
    """A data set at one commit. ``files``: name -> bytes."""

    repository: str
    commit: str
    files: dict[str, int]
    licence: str | None

    def matching(self, pattern: str) -> dict[str, int]:
        found = fnmatch.filter(self.files, pattern)
        return {name: self.files[name] for name in sorted(found)}

    def open(self, name: str) -> RemoteFile:
        place = f"{self.repository}/resolve/{self.commit}/{urllib.parse.quote(name)}"
        return RemoteFile(f"{endpoint()}/datasets/{place}", self.files[name])


def snapshot(repository: str, revision: str, *, advice: str) -> Snapshot:
    """What the data set has at ``revision``: a branch, or the commit of an earlier answer.

    Raises Refused, or EnvironmentProblem when there is no answer, or one of another kind.
    """
    where = urllib.parse.quote(revision, safe="")
    url = f"{endpoint()}/api/datasets/{repository}/revision/{where}?blobs=true"

    def ask() -> bytes:
        request = urllib.request.Request(url, headers={"User-Agent": "thimble"})
        with open_url(request, timeout=30) as answer:
            return answer.read()

    try:
        found = json.loads(retried(url, ask, pause=PAUSE, advice=advice))
        licence = (found.get("cardData") or {}).get("license")
        return Snapshot(
            repository,
            found["sha"],
            {entry["rfilename"]: int(entry["size"]) for entry in found["siblings"]},
            ", ".join(licence) if isinstance(licence, list) else licence,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentProblem(f"{url} answers with something else than a data set.") from error


class RemoteFile(io.RawIOBase):
    """A file of the hub, read in blocks as they are asked for, each again where it broke off.

    So of a parquet file with many columns only those that are wanted travel, and reading can begin
    at any place. ``received`` counts the bytes that came. Raises EnvironmentProblem.
    """

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size = url, size
        self.received = self.place = 0
        self.blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place}.get(whence, self.size)
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` to its end or that of the file; pyarrow takes less for the end."""
        done = 0
        while done < len(buffer) and self.place < self.size:
            number, offset = divmod(self.place, BLOCK)
            piece = self._block(number)[offset : offset + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)
            self.place += len(piece)
        return done

    def _block(self, number: int) -> bytes:
        if number in self.blocks:
            self.blocks.move_to_end(number)
            return self.blocks[number]
        begin = number * BLOCK
        advice = "The same command goes on from here."
        data = retried(
            self.url,
            lambda: self._receive(begin, min(begin + BLOCK, self.size)),
            pause=PAUSE,
            advice=advice,
        )
        self.blocks[number] = data
        if len(self.blocks) > BLOCKS_KEPT:
            self.blocks.popitem(last=False)
        return data

    def _receive(self, begin: int, end: int) -> bytes:
        headers = {"User-Agent": "thimble", "Range": f"bytes={begin}-{end - 1}"}
        with open_url(urllib.request.Request(self.url, headers=headers), timeout=30) as answer:
            if answer.status != 206 and (begin, end) != (0, self.size):
                raise Refused(f"{self.url}: the server does not send parts of files.")
            data = answer.read(end - begin + 1)
        if len(data) != end - begin:
            raise http.client.HTTPException(
                f"broke off after {len(data):,} of {end - begin:,} bytes"
            )
        self.received += len(data)
        return data
