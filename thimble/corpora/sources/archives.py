"""Reading Debian packages and tar archives as streams, without dpkg and without trusting names."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from thimble.artifacts import fingerprint, fsync, temporary_name
from thimble.errors import DISK_FULL, DataError, disk_problem

AR_MAGIC = b"!<arch>\n"
DAMAGED = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError)


class Window(io.RawIOBase):
    """``size`` bytes of an open file from its current position on, as a file of its own."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self.file.read(min(len(buffer), self.left))
        if not data and self.left:
            raise EOFError("the file ends too early")
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)


def _decompressed(file: IO[bytes], name: str) -> Any:
    if name.endswith(".zst"):
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    if name.endswith(".xz"):
        return lzma.open(file)
    if name.endswith((".gz", ".tgz")):
        import gzip

        return gzip.open(file)
    if name.endswith(".bz2"):
        import bz2

        return bz2.open(file)
    return file


def _deb_part(file: IO[bytes], part: str) -> tuple[IO[bytes], str]:
    """Position a ``.deb`` (an ``ar`` archive) at its ``part``, "data.tar" or "control.tar"."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ValueError("not a Debian package")
    while header := file.read(60):
        if len(header) < 60 or header[58:] != b"`\n":
            raise EOFError("the package ends too early")
        name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
        if name.startswith(part):
            return io.BufferedReader(Window(file, size), 1 << 20), name
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"no {part} in the package")


def _tar_files(stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.isfile() and (content := tar.extractfile(member)) is not None:
                yield member.name.removeprefix("./"), content


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """Whatever shows that an archive is truncated or damaged becomes a DataError that names it."""
    problem = "{} is truncated or damaged ({}). Delete it and run the same command again."
    try:
        yield
    except DAMAGED as error:
        raise DataError(problem.format(path, error)) from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 report bad data as an OSError without a number
            raise DataError(problem.format(path, error)) from error
        raise


def files(path: Path, part: str = "data.tar") -> Iterator[tuple[str, IO[bytes]]]:
    """Every regular file in a ``.deb`` or ``.tar[.gz|.xz|.bz2|.zst]``: name and content stream.

    Links are passed over: their target is in the archive under its own name. A source package of
    the kernel holds its tree as one more archive; that is entered as if it were unpacked. A file
    that is no archive is the one file in itself. To be used inside ``whole(path)``.
    """
    with open(path, "rb") as file:
        stream, name = _deb_part(file, part) if path.suffix == ".deb" else (file, path.name)
        if ".tar" not in name:
            yield name, file
            return
        for inner, content in _tar_files(_decompressed(stream, name)):
            if inner.startswith("usr/src/") and ".tar" in PurePosixPath(inner).name:
                yield from _tar_files(_decompressed(content, inner))
            else:
                yield inner, content


def unpack(path: Path, sha256: str, below: Path, wanted: tuple[str, ...]) -> Path:
    """Unpack the files that match a pattern of ``wanted`` below ``below``; return their folder.

    The folder is named by the archive, its ``sha256`` and the patterns, and appears only when it
    is complete, so a second call returns at once.
    """
    target = below / f"{path.stem}-{fingerprint([sha256, sorted(wanted)])[:12]}"
    if target.is_dir():
        return target
    temporary = temporary_name(target)
    try:
        with whole(path):
            for name, content in files(path):
                parts = PurePosixPath(name).parts
                if ".." in parts or name.startswith("/"):
                    raise DataError(f"{path} holds a file named {name}, outside of the archive.")
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
                    destination = temporary / name
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    destination.write_bytes(content.read())
        temporary.mkdir(parents=True, exist_ok=True)
        fsync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_problem(error, target) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
