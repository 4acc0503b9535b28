"""Find the files inside a tar archive by its headers alone; nothing is ever extracted.

Python's `tarfile` takes a damaged header in the middle of an archive, or a missing end, for the end of the archive. The
images behind it would be left out without a word, so here both are errors.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
# Bytes to read at once, a page of memory: after an image come a small label and the header of the next image.
AHEAD = 4096
# bytes of a long name or of other attributes that a header of their own holds
MAX_ATTRIBUTES = 1 << 20
LINKS_AND_DEVICES = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
}  # fmt: skip


class BadTar(ValueError):
    """Why a file is not a tar archive that can be used; the message does not name the file."""


class Member(NamedTuple):
    """A regular file in an archive: its name, and where in the archive its bytes are."""

    name: str
    offset: int
    size: int


class Archive:
    """An uncompressed tar archive: ustar, or with the long names and large sizes of GNU tar and of pax.

    Args:
        file: descriptor of the open archive, a regular file.
    """

    def __init__(self, file: int) -> None:
        self.file, self.size = file, os.fstat(file).st_size
        self._start, self._ahead = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the archive; fewer where it ends."""
        skipped = offset - self._start
        if skipped < 0 or skipped + size > len(self._ahead):
            self._start, self._ahead, skipped = offset, os.pread(self.file, max(size, AHEAD), offset), 0
        return self._ahead[skipped : skipped + size]

    def members(self) -> Iterator[Member]:
        """The regular files, in the order of the archive. Folders are left out.

        Raises:
            BadTar: the archive is damaged or truncated, or has a member that is neither a regular file nor a folder.
        """
        offset, shared, own = 0, {}, {}
        while (header := self._header(offset)) is not None:
            kind, start = header[156:157], offset + BLOCK
            name, size = _name(header, own), _number(header[124:136])
            if b"size" in own:
                size = _number(own[b"size"], 10)
            elif kind == b"5":
                size = 0
            if size is None:
                raise BadTar(f"{name} has no size that can be read")
            if start + size > self.size:
                raise BadTar(f"it is truncated: {name} would end at byte {start + size}, the file ends at {self.size}")
            if kind == b"g":
                shared |= self._attributes(start, size)
                own = {**shared, **own}
            elif kind == b"x":
                own |= self._attributes(start, size)
            elif kind == b"L":
                own[b"path"] = self._small(start, size).rstrip(b"\0")
            elif kind != b"K":
                if kind != b"0" or own:
                    _refuse_odd(kind, name, own)
                if kind != b"5" and not name.endswith("/"):
                    yield Member(name, start, size)
                own = dict(shared)
            offset = start + -(-size // BLOCK) * BLOCK

    def _header(self, offset: int) -> bytes | None:
        """The header at an offset; None at the end of the archive, which only zeros may follow."""
        header = self.read(offset, BLOCK)
        if not self.size:
            raise BadTar("it is empty")
        if len(header) < BLOCK:
            raise BadTar(f"it is truncated: it ends at byte {self.size} without the end mark of a tar archive")
        if not any(header):
            while offset < self.size:
                rest = self.read(offset, 1 << 20)
                if any(rest):
                    raise BadTar("more follows the end of the tar archive, as in joined archives")
                offset += len(rest)
            return None
        # The checksum is the sum of all bytes, its own counted as blanks. The lower half of Adler-32 is 1 + this sum,
        # modulo 65521, and far faster than a sum in Python.
        total = (zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF) - 1
        stored = _number(header[148:156])
        if stored is None or (stored - total) % 65521:
            raise BadTar(f"there is no tar header at byte {offset}" if offset else "it is no uncompressed tar archive")
        return header

    def _attributes(self, start: int, size: int) -> dict[bytes, bytes]:
        """The attributes of a pax header: lines "LENGTH KEY=VALUE", where the length counts the whole line."""
        content, attributes, line = self._small(start, size), {}, 0
        while line < size:
            digits = content[line : line + 20].partition(b" ")[0]
            length = _number(digits, 10) or 0
            if not len(digits) + 1 < length <= size - line:
                raise BadTar(f"the attributes at byte {start} are damaged")
            key, _, value = content[line + len(digits) + 1 : line + length - 1].partition(b"=")
            attributes[key] = value
            line += length
        return attributes

    def _small(self, start: int, size: int) -> bytes:
        if size > MAX_ATTRIBUTES:
            raise BadTar(f"the attributes at byte {start} have {size} bytes; {MAX_ATTRIBUTES} are the most")
        return self.read(start, size)


def _refuse_odd(kind: bytes, name: str, attributes: dict[bytes, bytes]) -> None:
    """Refuse a member that is neither a regular file nor a folder."""
    what = LINKS_AND_DEVICES.get(kind)
    if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in attributes):
        what = "a sparse file"
    elif what is None and kind not in b"057\0":
        what = "a member of an unknown type"
    if what is not None:
        raise BadTar(f"{name} is {what}; only regular files are read")


def _number(field: bytes, base: int = 8) -> int | None:
    """A number in a header: digits, or the bytes of an integer after a first upper bit; None for anything else."""
    if base == 8 and field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    try:
        return int(digits, base) if digits.isdigit() else None
    except ValueError:
        return None


def _name(header: bytes, attributes: dict[bytes, bytes]) -> str:
    name = attributes.get(b"path")
    if name is None:
        name = header[:100].split(b"\0", 1)[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")
