"""Reading compressed files so that a truncated one is never taken for a whole one."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from thimble.errors import DataError

COMPRESSED = (".gz", ".zst", ".xz")


class WholeZstd(io.RawIOBase):
    """A zstd file as a stream. Unlike the library's own reader, it refuses a frame without end."""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self.file, self.new = file, zstandard.ZstdDecompressor().decompressobj
        self.frame = self.new()
        self.fresh = True  # nothing of the current frame was read yet
        self.input = b""
        self.output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.output:
            self.input = self.input or self.file.read(1 << 16)
            if not self.input:
                if not self.fresh:
                    raise EOFError("its last zstd frame does not end")
                return 0
            self.fresh = False
            self.output = self.frame.decompress(self.input)
            self.input = b""
            if self.frame.eof:
                self.input = self.frame.unused_data
                self.frame, self.fresh = self.new(), True
        size = min(len(buffer), len(self.output))
        buffer[:size], self.output = self.output[:size], self.output[size:]
        return size

    def close(self) -> None:
        self.file.close()
        super().close()


def open_bytes(path: str | Path) -> IO[bytes] | gzip.GzipFile | lzma.LZMAFile:
    """Open a file for reading, decompressed by its ending (.gz, .zst, .xz)."""
    name = str(path)
    if name.endswith(".gz"):
        return gzip.open(path)
    if name.endswith(".xz"):
        return lzma.open(path)
    if name.endswith(".zst"):
        return io.BufferedReader(WholeZstd(open(path, "rb")), 1 << 18)
    return open(path, "rb")


def damaged(path: str | Path, error: Exception) -> DataError:
    return DataError(f"{path} is truncated or damaged: {error}. Get it again, or leave it out.")


def _errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zstandard.ZstdError)


def chunks(path: str | Path, size: int = 1 << 20) -> Iterator[bytes]:
    """A file's content in chunks of ``size`` bytes; DataError when it is truncated or damaged."""
    try:
        with open_bytes(path) as file:
            while chunk := file.read(size):
                yield chunk
    except _errors() as error:
        raise damaged(path, error) from error


def read_bytes(path: str | Path) -> bytes:
    """A file's content as a whole; DataError when it is truncated or damaged."""
    return b"".join(chunks(path))


def lines(path: str | Path) -> Iterator[bytes]:
    """A file line by line; DataError when it is truncated or damaged."""
    try:
        with open_bytes(path) as file:
            yield from file
    except _errors() as error:
        raise damaged(path, error) from error
