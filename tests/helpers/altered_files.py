"""Files that change after they were read."""

import os

SECOND = 10**9


def alter(path, data):
    """Write other bytes into a file; by its time, a second after it was last changed."""
    time = os.stat(path).st_mtime_ns + SECOND
    with open(path, "r+b") as file:
        file.truncate(len(data))
        file.write(data)
    os.utime(path, ns=(time, time))


def flip(path, position):
    """Alter one bit of a file."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data[position] ^= 1
    alter(path, data)


HARMS = {
    "altered": (lambda path: flip(path, 700), "is altered"),
    "truncated": (lambda path: os.truncate(path, 600), "600"),
    "removed": (os.unlink, "is missing"),
}
"""What may happen to a shard, and what is said of it."""
