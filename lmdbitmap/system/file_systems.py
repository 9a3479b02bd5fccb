"""Which file system holds a file, and how much room it has."""

from __future__ import annotations

import os

from lmdbitmap.errors import os_errors_at
from lmdbitmap.system import linux

FILESYSTEM_KINDS = {
    0xEF53: "ext4",  # ext2 and ext3 too: they share the number
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x3153464A: "jfs",
    0x52654973: "reiserfs",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x794C7630: "overlay",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0x7366746E: "ntfs3",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x65735546: "fuse",  # sshfs, glusterfs, s3fs, virtiofs: the number does not tell which
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x5346414F: "afs",
    0x6B414653: "afs",
    0x73757245: "coda",
    0x564C: "ncp",
    0x20030528: "orangefs",
    0x19830326: "beegfs",
    0xAAD7AAEA: "panfs",
    0x47504653: "gpfs",
    0x01161970: "gfs2",
    0x7461636F: "ocfs2",
    0x786F4256: "vboxsf",
}
"""The `f_type` of statfs(2), by name."""

NETWORK_FILESYSTEMS = {
    "nfs", "cifs", "smb2", "smb", "fuse", "9p", "ceph", "lustre", "afs", "coda", "ncp", "orangefs", "beegfs",
    "panfs", "gpfs", "gfs2", "ocfs2", "vboxsf",
}  # fmt: skip
"""File systems that cannot hold a store: another machine may write, or two processes' mappings may differ."""


def filesystem_kind(path: str | os.PathLike[str]) -> str:
    """Return the kind of file system that holds `path`, such as `ext4` or `nfs`; `unknown 0x…` if not in our table."""
    place = os.fspath(path)
    with os_errors_at(place):
        number = linux.filesystem_number(place)
    return FILESYSTEM_KINDS.get(number, f"unknown {number:#x}")


def is_network_filesystem(kind: str) -> bool:
    return kind in NETWORK_FILESYSTEMS


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return how many bytes an ordinary user may still write to the file system that holds `path`."""
    place = os.fspath(path)
    with os_errors_at(place):
        status = os.statvfs(place)
    return status.f_bavail * status.f_frsize
