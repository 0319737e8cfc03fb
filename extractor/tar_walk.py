"""Strict walk over the headers of a tar: what Python's reader passes over in silence is an error.

``tarfile`` (and webdataset on top of it) takes a damaged header, or the end of a cut file, for the
end of the archive. Here every byte from the first header to the end of the file is accounted for,
except the members' contents, which are never read.

End rule. After the last member stand two zero blocks and then nothing but zeros: either none, or as
many as fill the tar's last record of 10,240 bytes. A file that ends anywhere else was cut, and one
with a longer tail of zeros was reserved on disk and never filled.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from classlens.extractor.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE

# Far above any real name, far below what would fill the memory.
_MAX_EXTENSION_BYTES = 1 << 20

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ\x00": "xz -d",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar. All numbers are bytes, all offsets from the start of the tar.

    header: its first header block (long names have several). data, size: its contents.
    end: behind the padding of its contents, where the next header stands.
    """

    name: str
    header: int
    data: int
    size: int
    end: int


def walk_tar(path: str | Path) -> Iterator[Member]:
    """The regular files of a tar in the order they stand in it; folders are left out.

    PAX and GNU long names are understood. Contents are skipped by seeking.

    Raises:
        ShardError: the file is missing, empty, compressed, no tar, cut or damaged, or it holds
            links, devices, sparse files, or names that are absolute or climb with ``..``. The
            message names the file, the member and the byte offset. Members before the fault have
            been yielded by then.
    """
    with open_tar(path) as file:
        yield from _Walk(Path(path), file).members()


def open_tar(path: str | Path) -> BinaryIO:
    """A tar opened for reading bytes.

    Raises:
        ShardError: it is missing or may not be read.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise ShardError(
            f"{path} cannot be opened ({error.strerror}); check the path and its permissions."
        ) from error


class _Walk:
    """One walk: the open file, and the last good member for the messages."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.last = "the start"
        # TarInfo.fromtarfile wants a TarFile; made on an empty archive, it does not read ours.
        self.tar = tarfile.TarFile(
            fileobj=io.BytesIO(bytes(2 * BLOCK)), encoding="utf-8", errors="surrogateescape"
        )
        self.tar.fileobj = file

    def members(self) -> Iterator[Member]:
        self._refuse_other_formats()
        offset = 0
        while (found := self._header(offset)) is not None:
            info, data = found
            name = self._checked_name(info, offset)
            if info.isdir():
                offset = data
                continue
            if info.size < 0:
                self._fail(offset, f"the header of {name!r} states a negative size")
            end = data + _padded(info.size)
            if end > self.size:
                part = "data" if data + info.size > self.size else "padding"
                self._fail(self.size, f"the file is cut inside the {part} of member {name!r}")
            self.last = f"member {name!r}"
            yield Member(name, offset, data, info.size, end)
            offset = end
        self._check_end(offset)

    def _header(self, start: int) -> tuple[tarfile.TarInfo, int] | None:
        """The header at ``start`` and where its data begins; None at the end-of-archive mark."""
        offset = start
        while True:
            block = self._read(offset, BLOCK)
            if len(block) < BLOCK:
                what = "inside a header" if block or offset > start else "before its end mark"
                self._fail(self.size, f"the file is cut {what}, after {self.last}")
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                if not any(block) and offset == start:
                    return None
                self._fail(offset, f"the header after {self.last} is damaged ({error})")
            if info.type not in _EXTENSIONS:
                break
            offset = self._skip_extension(info, offset)
        if offset > start:
            info = self._with_extensions(start)
        self._check_type(info, start)
        return info, offset + BLOCK

    def _skip_extension(self, info: tarfile.TarInfo, offset: int) -> int:
        if not 0 <= info.size <= _MAX_EXTENSION_BYTES:
            self._fail(offset, f"the extended header after {self.last} has {info.size} bytes")
        end = offset + BLOCK + _padded(info.size)
        if end > self.size:
            self._fail(self.size, f"the file is cut inside a header, after {self.last}")
        if info.type in _PAX and not _is_pax(self._read(offset + BLOCK, info.size)):
            self._fail(offset, f"the extended header after {self.last} is damaged")
        return end

    def _with_extensions(self, start: int) -> tarfile.TarInfo:
        self.file.seek(start)
        try:
            info = tarfile.TarInfo.fromtarfile(self.tar)
        except (tarfile.TarError, ValueError, IndexError, RecursionError) as error:
            self._fail(start, f"the extended header after {self.last} is damaged ({error})")
        if self.tar.pax_headers.keys() & {"path", "linkpath", "size", "hdrcharset"}:
            # Would hold for all members behind it, and be lost to whoever reads a slice.
            self._fail(start, "a global header renames or resizes all members")
        if info.issparse():
            info.type = tarfile.GNUTYPE_SPARSE
        return info

    def _check_type(self, info: tarfile.TarInfo, offset: int) -> None:
        if info.type in _FILES or info.isdir():
            return
        kind = _REFUSED.get(info.type, f"of the unknown type {info.type!r}")
        raise ShardError(
            f"{self.path}: member {info.name!r} at byte {offset} is {kind}; pack regular files "
            "only (`tar --dereference --hard-dereference`, without `--sparse`)."
        )

    def _checked_name(self, info: tarfile.TarInfo, offset: int) -> str:
        name = info.name
        if name.startswith("/") or ".." in name.split("/"):
            fault = "is absolute or climbs out of its folder"
        elif "\n" in name or not _is_utf8(name):
            fault = "holds a line break or is not UTF-8"
        else:
            return name
        raise ShardError(
            f"{self.path}: the name of member {name!r} at byte {offset} {fault}; "
            "rename it and pack the tar again."
        )

    def _check_end(self, offset: int) -> None:
        end = offset + 2 * BLOCK
        record_end = -(-end // RECORD) * RECORD
        for start in range(offset, min(self.size, record_end), BLOCK):
            if any(self._read(start, BLOCK)):
                self._fail(start, f"data follow the end mark that stands after {self.last}")
        if self.size not in (end, record_end):
            cut = self.size < record_end
            what = "the file is cut in its last record" if cut else "bytes follow its last record"
            self._fail(
                min(self.size, record_end),
                f"{what}, after {self.last} (an unfinished copy, or a blocking factor other "
                "than tar's usual 20)",
            )

    def _refuse_other_formats(self) -> None:
        block = self._read(0, BLOCK)
        if not block:
            raise ShardError(f"{self.path} is empty; copy or download it again.")
        for magic, command in _COMPRESSED.items():
            if block.startswith(magic):
                raise ShardError(
                    f"{self.path} is compressed, and its members cannot be reached by offset; "
                    f"decompress it first (`{command}`)."
                )
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if not any(block):
                return
            raise ShardError(
                f"{self.path} is not a tar file, or its first header, at byte 0, is damaged "
                f"({error}); give a .tar file or copy it again."
            ) from error

    def _read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(size)

    def _fail(self, offset: int, what: str) -> NoReturn:
        raise ShardError(
            f"{self.path}: {what}, at byte {offset}; copy, download or pack the file again."
        )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_pax(records: bytes) -> bool:
    """Whether the bytes are ``"<length> <keyword>=<value>\\n"`` records and nothing else.

    tarfile drops the rest from the first malformed one, and with it the member's real name.
    """
    while records:
        digits = records.partition(b" ")[0]
        if not digits.isdigit() or len(digits) > len(str(_MAX_EXTENSION_BYTES)):
            return False
        record, records = records[: int(digits)], records[int(digits) :]
        if len(record) != int(digits) or not record.endswith(b"\n") or b"=" not in record:
            return False
    return True
