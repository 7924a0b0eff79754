"""What the corpus ``os_kernel`` is made of: packages, the files in them, and their categories."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

# Part of what makes a corpus current: raised whenever the same sources give other documents.
VERSION = 2

OS_CODE, HARDWARE, ADMINISTRATION, QA = "os_code", "hardware", "administration", "qa"

# The shares the specification asks for, in bytes of the finished corpus.
MIXTURE = {OS_CODE: 0.4, HARDWARE: 0.3, ADMINISTRATION: 0.2, QA: 0.1}

# Manual sections: 2, 3, 9 are interfaces of the system; 4 its devices; 1, 5, 6, 7, 8 its use.
SECTIONS = {"2": OS_CODE, "3": OS_CODE, "9": OS_CODE, "4": HARDWARE}


@dataclass(frozen=True)
class Files:
    """Files of a package that match ``pattern`` and how they are read.

    ``category`` is None where the file itself decides (a manual page by its section, a document
    of the kernel by its folder).
    """

    pattern: str
    kind: str
    category: str | None = None


@dataclass(frozen=True)
class Source:
    """A Debian package by the pattern of its name, and the files taken from it."""

    package: str
    name: str
    files: tuple[Files, ...]
    licence: str = ""  # only where the package's copyright file cannot be read by a program
    share: float = 1.0  # of the files, chosen by a hash of their names

    def takes(self, file: str) -> bool:
        """Whether a file is among the share of them that is read."""
        return self.share == 1.0 or zlib.crc32(file.encode()) < self.share * (1 << 32)

    def wanted(self) -> tuple[str, ...]:
        return (*(files.pattern for files in self.files), "usr/share/doc/*/copyright")


MANUAL = (Files("usr/share/man/man?/*", "manual"),)
DOCUMENTATION = (
    Files("*/Documentation/devicetree/bindings/*", "binding", HARDWARE),
    Files("*/Documentation/*.rst*", "document"),
    Files("*/Documentation/*.txt*", "document"),
    Files("*/Documentation/ABI/*", "document"),
)

MANUAL_AND_TEXTS = (*MANUAL, Files("usr/share/doc/*.txt*", "document", ADMINISTRATION))

# What an administrator uses daily; small downloads with much text.
TOOLS = (
    "coreutils", "util-linux", "mount", "fdisk", "systemd", "udev", "iproute2", "apt", "dpkg",
    "dpkg-dev", "kmod", "pciutils", "usbutils", "procps", "psmisc", "e2fsprogs", "btrfs-progs",
    "lvm2", "mdadm", "cryptsetup-bin", "nftables", "iptables", "openssh-client", "sudo", "rsync",
    "cron", "login", "passwd", "man-db", "multipath-tools", "dnsmasq-base", "apparmor",
    "findutils", "grep", "sed", "gawk", "tar", "gzip", "bash", "auditd", "nfs-common", "trace-cmd",
    "logrotate", "smartmontools", "nvme-cli", "libvirt-clients", "qemu-system-common",
    "samba-common-bin", "git-man", "debhelper", "curl", "ncurses-bin", "adduser", "debconf",
    "initramfs-tools-core", "ifupdown", "selinux-utils", "quota",
)  # fmt: skip

DEVICES = (
    "libsane-common", "nut-server", "ndctl", "ipmctl", "alsa-utils", "opensc", "infiniband-diags",
    "gpsd", "i2c-tools", "lm-sensors", "flashrom", "dmidecode", "hdparm", "lirc", "iucode-tool",
    "joystick", "hwloc-nox", "rasdaemon", "acpica-tools",
)  # fmt: skip

# For scale=full, which needs five times as much text about administration.
MORE_TOOLS = (
    "perl-doc", "zsh-common", "groff", "postfix", "postgresql-client-[0-9]+", "slurm-client",
    "lintian", "devscripts", "slapd", "collectd-core", "binutils-common", "openvswitch-common",
    "openvswitch-switch", "shorewall", "rrdtool", "freeipmi-tools", "drbd-utils", "lttng-tools",
    "guestfish", "borgbackup", "firewalld", "nmap", "tcsh", "lxc", "podman", "buildah",
    "libpam-modules", "samba", "wireguard-tools", "openssh-server", "network-manager",
    "wpasupplicant", "bluez", "xfsprogs", "chrony", "isc-dhcp-client", "bind9-dnsutils", "less",
    "screen", "tmux", "wget", "strace", "ltrace", "lsof", "tcpdump", "net-tools", "grub-common",
    "parted", "ipmitool", "fio", "numactl", "powertop", "rsyslog", "xz-utils", "zstd", "libc-bin",
    "keyutils", "acl", "attr", "policycoreutils", "open-iscsi", "bpftool", "bpftrace",
    "systemd-container", "debootstrap", "live-build", "sbuild", "pbuilder", "aptitude", "rpm",
    "ostree", "flatpak", "snmp", "autofs", "openvpn", "monit", "tor", "amanda-common",
    "bacula-common", "inn2", "wireshark-common",
)  # fmt: skip

MORE_TEXTS = (
    "dovecot-core", "exim4-base", "haproxy", "debian-policy", "debian-faq",
)  # fmt: skip

MORE_DEVICES = (
    "xserver-xorg-input-libinput", "xserver-xorg-video-intel", "xserver-xorg-video-amdgpu",
    "v4l-utils", "gpiod", "device-tree-compiler", "dfu-util", "fwupd", "nut-client", "openocd",
    "mtd-utils", "setserial", "rdma-core", "ibverbs-utils", "libibverbs-dev", "inputattach",
    "evtest", "thermald", "lshw", "edac-utils", "libpfm4-dev",
)  # fmt: skip

MORE_CODE = (
    "systemtap-doc", "liburing-dev", "libsystemd-dev", "libpapi-dev",
)  # fmt: skip


def named(names: tuple[str, ...], *files: Files) -> tuple[Source, ...]:
    return tuple(Source(name, name, files) for name in names)


COMMON = (
    Source("pci\\.ids", "pci.ids", (Files("usr/share/misc/pci.ids", "pci"),)),
    Source("usb\\.ids", "usb.ids", (Files("usr/share/misc/usb.ids", "usb"),)),
    *named(("manpages", "manpages-dev", "freebsd-manpages", *TOOLS), *MANUAL),
    *named(DEVICES, Files("usr/share/man/man?/*", "manual", HARDWARE)),
    Source(
        "debian-reference-en",
        "debian-reference",
        (Files("usr/share/debian-reference/*.txt.gz", "handbook", ADMINISTRATION),),
    ),
)

QUICK = (
    *COMMON,
    # All of the kernel's files are more than the quick corpus can hold.
    Source("linux-doc-[0-9.]+", "linux-doc", DOCUMENTATION, "GPL-2.0-only", share=0.4),
    Source(
        "linux-headers-[0-9].*-common",
        "linux-headers",
        (Files("usr/src/*.h", "code", None),),
        "GPL-2.0-only",
        share=0.45,
    ),
)

FULL = (
    *COMMON,
    *named(MORE_TOOLS, Files("usr/share/man/man?/*", "manual", ADMINISTRATION)),
    *named(MORE_TEXTS, *MANUAL_AND_TEXTS),
    *named(MORE_DEVICES, Files("usr/share/man/man?/*", "manual", HARDWARE)),
    *named(MORE_CODE, *MANUAL),
    Source(
        "linux-source-[0-9.]+",
        "linux",
        (
            *DOCUMENTATION,
            Files("*/Kconfig*", "kconfig", None),
            Files("*.dts", "devicetree", HARDWARE),
            Files("*.dtsi", "devicetree", HARDWARE),
            Files("*.[chS]", "code", None),
        ),
        "GPL-2.0-only",
    ),
)

UPSTREAM = (
    Source("linux-6.12", "linux", FULL[-1].files, "GPL-2.0-only"),
    Source("man-pages-6.9.1", "man-pages", (Files("*/man/man?/*.?", "manual"),), "various"),
    Source("iproute2-6.12.0", "iproute2", (Files("*/man/man?/*.?", "manual"),), "GPL-2.0-or-later"),
    Source("pci-ids", "pci.ids", (Files("pci.ids", "pci"),), "GPL-2.0-or-later OR BSD-3-Clause"),
    Source("usb-ids", "usb.ids", (Files("usb.ids", "usb"),), "GPL-2.0-or-later OR BSD-3-Clause"),
)

# The sources of a scale, and the bytes of the finished corpus at most; None is all there is.
SCALES: dict[str, tuple[tuple[Source, ...], int | None]] = {
    "quick": (QUICK, 28_000_000),
    "full": (FULL, None),
}

# Folders of Documentation/ and of the source that are about hardware or administration; what is in
# neither list is about the operating system itself.
HARDWARE_FOLDERS = frozenset((
    "PCI", "accel", "arc", "arch", "arm", "arm64", "auxdisplay", "cdrom", "csky", "devicetree",
    "driver-api", "fb", "features", "firmware-guide", "firmware_class", "fpga", "gpu", "hid",
    "hwmon", "i2c", "ia64", "iio", "infiniband", "input", "isdn", "leds", "loongarch", "m68k",
    "media", "mhi", "mips", "misc-devices", "nios2", "nvdimm", "nvme", "openrisc", "parisc",
    "pcmcia", "peci", "powerpc", "riscv", "s390", "scsi", "sh", "sound", "sparc", "spi", "staging",
    "timers", "tpm", "usb", "w1", "watchdog", "x86", "xtensa", "drivers", "dt-bindings", "mfd",
    "mtd", "mmc", "bluetooth", "ssb", "bcma", "pinctrl", "regulator", "clk", "gpio", "pci", "amba",
))  # fmt: skip
ADMINISTRATION_FOLDERS = frozenset((
    "admin-guide", "ABI", "tools", "kbuild", "process", "userspace-api",
))  # fmt: skip


def kernel_category(path: str) -> str:
    """The category of a file of the kernel by the folders of its path."""
    parts = path.split("/")
    if "Documentation" in parts:
        parts = parts[parts.index("Documentation") + 1 :]
        if parts[0] in ADMINISTRATION_FOLDERS:
            return ADMINISTRATION
        if parts[0] in HARDWARE_FOLDERS or "device_drivers" in parts:
            return HARDWARE
    elif "arch" in parts or "dt-bindings" in parts:
        return HARDWARE
    elif parts[-1].startswith("Kconfig"):
        return ADMINISTRATION
    return OS_CODE
