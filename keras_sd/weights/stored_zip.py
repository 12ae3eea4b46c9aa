"""Reads zip files with uncompressed entries in place, such as torch's.

Python's own reader copies the data. It also needs about 1 kB of memory for each directory entry of 46 bytes,
which a malicious file could abuse.
"""

import struct
from typing import NamedTuple

ZIP_MAGIC = b"PK\x03\x04"

_DIRECTORY_MAGIC = b"PK\x01\x02"
_END_MAGIC = b"PK\x05\x06"
_END64_MAGIC = b"PK\x06\x06"
_END64_LOCATOR_MAGIC = b"PK\x06\x07"
_LONGEST_COMMENT = 2**16
_IN_ZIP64 = 2**32 - 1  # placeholder: the value has 8 bytes and is in the zip64 extra field
_MOST_ENTRIES = 100_000


class DamagedFile(ValueError):
    """A fault in a file, described in a few words."""


class _Entry(NamedTuple):
    """The offset of an entry's local header, the size of its content, and whether it is uncompressed."""

    header: int
    size: int
    is_stored: bool


class StoredZip:
    """The entries of a zip file in memory, usually a mapped one.

    Args:
        data: NumPy array of the file's bytes, uint8.

    Attributes:
        names: the names of all entries.

    Raises:
        DamagedFile, struct.error: the directory is damaged, or an entry lies outside the file.
    """

    def __init__(self, data):
        self._data = data
        self._entries = {}
        count, position = self._directory()
        for _ in range(count):
            name, entry, position = self._entry(position)
            if name in self._entries:
                raise DamagedFile("a zip with two entries of one name")
            self._entries[name] = entry

    @property
    def names(self):
        return self._entries.keys()

    def content(self, name):
        """Return the bytes of an entry, as a view.

        Raises:
            DamagedFile: there is no such entry, or it is compressed, encrypted or outside the file.
        """
        if name not in self._entries:
            raise DamagedFile(f"its entry {name!r:.60} is missing")
        header, size, is_stored = self._entries[name]
        if not is_stored:
            raise DamagedFile(
                f"its entry {name!r:.60} is compressed or encrypted, which torch's tensors never are"
            )
        magic, name_length, extra_length = struct.unpack_from("<4s22xHH", self._data, header)
        begin = header + 30 + name_length + extra_length
        if magic != ZIP_MAGIC or begin + size > len(self._data):
            raise DamagedFile(f"its entry {name!r:.60} does not lie inside of the file")
        return self._data[begin : begin + size]

    def _directory(self):
        """Return the number of entries and the position of the directory."""
        tail = max(0, len(self._data) - 22 - _LONGEST_COMMENT)
        end = self._data[tail:].tobytes().rfind(_END_MAGIC) + tail
        if end < tail or end + 22 > len(self._data):
            raise DamagedFile("a zip without its end, truncated")
        count, size, offset = struct.unpack_from("<HLL", self._data, end + 10)
        if end >= 20 and self._data[end - 20 : end - 16].tobytes() == _END64_LOCATOR_MAGIC:
            (end64,) = struct.unpack_from("<Q", self._data, end - 12)
            magic, count, size, offset = struct.unpack_from("<4s28xQQQ", self._data, end64)
            if magic != _END64_MAGIC:
                raise DamagedFile("a zip with a damaged end")
        if count > _MOST_ENTRIES or offset + size > end:
            raise DamagedFile(f"a zip whose directory of {count} entries cannot be right")
        return count, offset

    def _entry(self, position):
        """Return one record of the directory: name, `_Entry` and the position after the record."""
        magic, flags, method, compressed, size, name_length, extra_length, comment_length, header = (
            struct.unpack_from("<4s4xHH8xLLHHH8xL", self._data, position)
        )
        name_end = position + 46 + name_length
        name = self._data[position + 46 : name_end].tobytes().decode("utf-8", "replace")
        if magic != _DIRECTORY_MAGIC:
            raise DamagedFile("a zip with a damaged directory")
        extra_end = name_end + extra_length
        wide = iter(_zip64_values(self._data[name_end:extra_end].tobytes()))
        size, compressed, header = (
            next(wide, _IN_ZIP64) if value == _IN_ZIP64 else value for value in (size, compressed, header)
        )
        is_stored = not method and not flags & 1
        if (is_stored and size != compressed) or header + 30 + compressed > len(self._data):
            raise DamagedFile(f"its entry {name!r:.60} does not lie inside of the file")
        # TorchScript compresses its code entries, which are never read here.
        return name, _Entry(header, size, is_stored), extra_end + comment_length


def _zip64_values(extra):
    """Return the 8-byte values in an entry's extra fields."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            return struct.unpack_from(f"<{length // 8}Q", extra, position + 4)
        position += 4 + length
    return ()
