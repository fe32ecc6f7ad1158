"""Writing of tar shards whose bytes depend on their content alone."""

from __future__ import annotations

import tarfile


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file to a tar, with mode 0644, time 0 and no owner, so that equal data give equal bytes.

    Returns:
        Where the data begin in the tar.
    """
    member = tarfile.TarInfo(name)
    member.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    # In one write, without the copies that addfile makes of the member.
    block = member.tobuf(tar.format) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    tar.fileobj.write(block)
    tar.offset += len(block)
    return start
