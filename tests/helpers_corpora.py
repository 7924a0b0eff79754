"""Small packages, archives and pages that the corpus tests make for themselves."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Mapping
from pathlib import Path

WORDS = [
    "kernel",
    "driver",
    "device",
    "memory",
    "page",
    "table",
    "interrupt",
    "handler",
    "queue",
    "buffer",
    "lock",
    "thread",
    "process",
    "signal",
    "file",
    "system",
    "mount",
    "inode",
    "cache",
    "block",
    "network",
    "packet",
    "socket",
    "port",
    "address",
    "register",
    "clock",
    "timer",
    "bus",
    "bridge",
    "firmware",
    "module",
    "option",
    "value",
    "size",
    "limit",
    "default",
    "error",
    "return",
    "read",
    "write",
    "open",
    "close",
    "start",
    "stop",
    "enable",
    "disable",
    "configure",
]


def prose(seed: object, words: int = 120) -> str:
    """English-looking text, different for each seed."""
    choose = random.Random(str(seed))
    return " ".join(
        f"The {choose.choice(WORDS)} of the {choose.choice(WORDS)} is {choose.choice(WORDS)} "
        f"{choose.randrange(10**6)}."
        for _ in range(words // 6)
    )


def tar(files: Mapping[str, bytes], mode: str = "w:xz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def deb(name: str, files: Mapping[str, bytes], version: str = "1.0") -> bytes:
    """A Debian package: an ``ar`` archive of a marker, a control and a data archive."""
    control = f"Package: {name}\nVersion: {version}\nDescription: test\n".encode()
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar({"control": control}),
        "data.tar.xz": tar(files),
    }
    out = b"!<arch>\n"
    for member, content in members.items():
        header = f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        out += header.encode() + content + b"\n" * (len(content) % 2)
    return out


def manual(name: str, section: int) -> bytes:
    page = (
        f".TH {name.upper()} {section}\n.SH NAME\n{name} \\- do {name} things\n.SH DESCRIPTION\n"
        + prose(name, 300)
    )
    return gzip.compress(page.encode(), mtime=0)


COPYRIGHT = (
    b"Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\n"
    b"Files: *\nCopyright: 2020 Somebody\nLicense: GPL-2+\n"
)


def packages(folder: Path) -> Path:
    """A folder with four packages that are enough for a tiny os_kernel corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    vendors = "".join(
        f"{vendor:04x}  Vendor {vendor} Incorporated\n"
        + "".join(f"\t{device:04x}  Device {vendor}-{device}\n" for device in range(12))
        for vendor in range(1, 60)
    )
    contents: dict[str, dict[str, bytes]] = {
        "pci.ids": {
            "usr/share/misc/pci.ids": vendors.encode(),
            "usr/share/doc/pci.ids/copyright": COPYRIGHT,
        },
        "manpages": {
            f"usr/share/man/man{section}/page{section}{number}.{section}.gz": manual(
                f"page{section}{number}", section
            )
            for section in (1, 2, 4, 8)
            for number in range(10)
        },
        "linux-doc-6.1": {
            f"usr/share/doc/linux-doc-6.1/Documentation/{folder}/{number}.rst.gz": gzip.compress(
                prose((folder, number), 400).encode(), mtime=0
            )
            for folder in ("mm", "hwmon", "admin-guide")
            for number in range(8)
        },
        "linux-headers-6.1.0-1-common": {
            f"usr/src/linux-headers-6.1.0-1-common/include/linux/h{number}.h": (
                f"/* {prose(number, 60)} */\nint f{number}(int x);\n"
            ).encode()
            for number in range(12)
        },
    }
    for name, files in contents.items():
        (folder / f"{name}_1.0_all.deb").write_bytes(deb(name, files))
    return folder
