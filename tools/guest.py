"""Make the guest that tests boot: Debian's cloud kernel, and a busybox root with a shell on its serial line.

    python tools/guest.py FOLDER      makes FOLDER/vmlinuz and FOLDER/initramfs, unless they are there

Nothing is installed: the packages are fetched and unpacked. Needs apt-get and dpkg-deb.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
)  # fmt: skip
"""In order of dependency. A kernel may have some of them built in, as it has ext4."""
INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in {" ".join(MODULES)}; do
    test -e /modules/$module.ko && insmod /modules/$module.ko
done
stty -F /dev/ttyS0 -echo
export PS1= PS2=
echo the guest is up
exec sh </dev/ttyS0 >/dev/ttyS0 2>&1
"""


def main(folder: Path) -> None:
    if (folder / "vmlinuz").exists() and (folder / "initramfs").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        kernel = unpacked(kernel_package(), work)
        busybox = unpacked("busybox-static", work)
        (work / "initramfs").write_bytes(gzip.compress(b"".join(initramfs(kernel, busybox)), 1))
        os.replace(work / "initramfs", folder / "initramfs")
        os.replace(next((kernel / "boot").glob("vmlinuz-*")), folder / "vmlinuz")


# --- packages ---


def kernel_package() -> str:
    """Return the package of the newest kernel, which Debian's metapackage depends on."""
    told = apt("apt-cache", "depends", "--important", "linux-image-cloud-amd64")
    return next(line.split()[1] for line in told.splitlines() if "Depends: linux-image-" in line)


def unpacked(package: str, work: Path) -> Path:
    place = work / package
    place.mkdir()
    apt("apt-get", "download", package, cwd=place)
    subprocess.run(["dpkg-deb", "-x", next(place.glob("*.deb")), place], check=True)
    return place


def apt(*command: str, cwd: Path | None = None) -> str:
    """Run the command and return its output. If it fails, package lists may be missing or stale: update and retry."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode or not (done.stdout or cwd):
        subprocess.run(["apt-get", "-qq", "update"], check=True, capture_output=True)
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True)
    return done.stdout


# --- the initramfs: a cpio archive of the kind that the kernel calls "newc" ---


def initramfs(kernel: Path, busybox: Path) -> Iterator[bytes]:
    for folder in ("bin", "dev", "proc", "sys", "mnt", "modules"):
        yield member(folder, 0o040755)
    yield member("init", 0o100755, INIT.encode())
    yield member("bin/busybox", 0o100755, (busybox / "bin/busybox").read_bytes())
    for module in MODULES:
        for found in kernel.glob(f"lib/modules/*/kernel/**/{module}.ko"):
            yield member(f"modules/{module}.ko", 0o100644, found.read_bytes())
    yield member("TRAILER!!!", 0)


def member(name: str, mode: int, content: bytes = b"") -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return padded(header) + padded(content)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
