"""What the corpus ``os_kernel`` is made of: packages, the files in them, and their categories."""

from __future__ import annotations

from dataclasses import dataclass

# Part of what makes a corpus current: raised whenever the same sources give other documents.
VERSION = 1

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

    def wanted(self) -> tuple[str, ...]:
        return (*(files.pattern for files in self.files), "usr/share/doc/*/copyright")


MANUAL = (Files("usr/share/man/man?/*", "manual"),)
DOCUMENTATION = (
    Files("*/Documentation/devicetree/bindings/*", "binding", HARDWARE),
    Files("*/Documentation/*.rst*", "document"),
    Files("*/Documentation/*.txt*", "document"),
    Files("*/Documentation/ABI/*", "document"),
)

ADMINISTRATIVE = (
    "coreutils", "util-linux", "mount", "fdisk", "systemd", "udev", "iproute2", "apt", "dpkg",
    "kmod", "pciutils", "usbutils", "procps", "psmisc", "e2fsprogs", "btrfs-progs", "xfsprogs",
    "mdadm", "lvm2", "cryptsetup-bin", "nftables", "iptables", "ethtool", "iw", "wpasupplicant",
    "openssh-client", "openssh-server", "cron", "rsyslog", "logrotate", "sudo", "passwd", "login",
    "bash", "grep", "sed", "gawk", "findutils", "tar", "gzip", "xz-utils", "strace", "ltrace",
    "lsof", "smartmontools", "hdparm", "nvme-cli", "dmidecode", "lshw", "grub-common",
    "initramfs-tools-core", "parted", "rsync", "tcpdump", "net-tools", "bind9-dnsutils",
    "nfs-common", "samba-common-bin", "git-man", "libc-bin", "ipmitool", "fio",
    "numactl", "hwloc-nox", "powertop", "cpufrequtils", "bluez", "network-manager",
    "qemu-system-common", "libvirt-clients", "man-db", "debconf",
    "debhelper", "dpkg-dev", "adduser", "ifupdown", "isc-dhcp-client", "dnsmasq-base", "chrony",
    "multipath-tools", "open-iscsi", "acl", "attr", "auditd", "apparmor", "selinux-utils",
    "policycoreutils", "keyutils", "quota", "bpftool", "bpftrace", "trace-cmd",
    "zstd", "less", "ncurses-bin", "screen", "tmux", "curl", "wget",
)  # fmt: skip

DEVICES = (
    "xserver-xorg-input-libinput", "xserver-xorg-video-intel", "xserver-xorg-video-amdgpu",
    "libsane-common", "alsa-utils", "v4l-utils", "lirc", "i2c-tools", "lm-sensors", "libgpiod-doc",
    "gpiod", "acpica-tools", "device-tree-compiler", "flashrom", "dfu-util", "fwupd", "rasdaemon",
    "usbutils", "nut-server", "nut-client", "gpsd", "edac-utils", "ndctl",
    "ipmctl", "opensc", "mtd-utils", "setserial", "rdma-core", "ibverbs-utils", "infiniband-diags",
    "joystick", "inputattach", "evtest", "thermald", "iucode-tool", "firmware-ath9k-htc",
)  # fmt: skip

COMMON = (
    Source("pci\\.ids", "pci.ids", (Files("usr/share/misc/pci.ids", "pci"),)),
    Source("usb\\.ids", "usb.ids", (Files("usr/share/misc/usb.ids", "usb"),)),
    Source("manpages", "manpages", MANUAL),
    Source("manpages-dev", "manpages-dev", MANUAL),
    Source("freebsd-manpages", "freebsd-manpages", MANUAL),
    Source(
        "debian-reference-en",
        "debian-reference",
        (Files("usr/share/debian-reference/*.txt.gz", "handbook", ADMINISTRATION),),
    ),
    *(Source(name.replace(".", "\\."), name, MANUAL) for name in ADMINISTRATIVE),
    *(
        Source(name.replace(".", "\\."), name, (Files("usr/share/man/man?/*", "manual", HARDWARE),))
        for name in DEVICES
        if name not in ADMINISTRATIVE
    ),
)

QUICK = (
    *COMMON,
    Source("linux-doc-[0-9.]+", "linux-doc", DOCUMENTATION, "GPL-2.0-only"),
    Source(
        "linux-headers-[0-9].*-common",
        "linux-headers",
        (Files("usr/src/*.h", "code", None),),
        "GPL-2.0-only",
    ),
)

FULL = (
    *COMMON,
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

# Bytes of the finished corpus at most; None is all there is.
SCALES: dict[str, tuple[tuple[Source, ...], int | None]] = {
    "quick": (QUICK, 40_000_000),
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
