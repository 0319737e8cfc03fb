"""The strict walk: whole tars read as tarfile reads them, and no damaged one passes."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classlens.extractor.errors import ShardError
from classlens.extractor.tar_walk import BLOCK, RECORD, Member, walk_tar

LONG = "folder/" * 30 + "ü" * 40 + ".jpg"


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def tar_bytes(members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return stream.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    # Never zero: a zero byte flipped or cut could go unseen for the wrong reason.
    return bytes(random.Random(seed).choices(range(1, 256), k=size))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A tar whose last record is full but for some blocks, with sizes at and around a block."""
    sizes = (0, 1, 511, 512, 513, 3000, 700, 20_000)
    members = {f"{i:03d}.jpg": noise(size, i) for i, size in enumerate(sizes)}
    path = tmp_path / "whole.tar"
    path.write_bytes(tar_bytes({**members, LONG: noise(900)}))
    assert path.stat().st_size % RECORD == 0
    return path


def walk_bytes(folder: Path, data: bytes) -> list[Member]:
    path = folder / "damaged.tar"
    path.write_bytes(data)
    return list(walk_tar(path))


def fault(path: Path) -> str | None:
    """The message of the ShardError that the walk ends in, if any."""
    try:
        for _ in walk_tar(path):
            pass
    except ShardError as error:
        return str(error)
    return None


def test_members_are_those_of_tarfile(whole: Path) -> None:
    members = list(walk_tar(whole))
    with tarfile.open(whole) as tar:
        expected = [(m.name, m.offset, m.offset_data, m.size) for m in tar if m.isfile()]
    assert [(m.name, m.header, m.data, m.size) for m in members] == expected
    assert members[-1].name == LONG
    assert members[-1].data - members[-1].header > BLOCK  # its PAX header was walked over
    assert all(m.end % BLOCK == 0 and 0 <= m.end - m.data - m.size < BLOCK for m in members)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(tmp_path: Path, tar_format: int) -> None:
    members = walk_bytes(tmp_path, tar_bytes({"a.cls": b"1", LONG: b"xyz"}, tar_format))
    assert [m.name for m in members] == ["a.cls", LONG]
    assert members[1].header == members[0].end


def test_contents_are_never_read(tmp_path: Path) -> None:
    """A member of 1 TiB is walked: the file is sparse on disk, and reading it would take hours."""
    info = tarfile.TarInfo("huge.jpg")
    info.size = 1 << 40
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        end = BLOCK + info.size
        try:
            file.truncate(end + 2 * BLOCK)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    assert list(walk_tar(path)) == [Member("huge.jpg", 0, BLOCK, info.size, end)]


def test_folders_and_comments_are_passed_over(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"comment": "made by hand"}) as tar:
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, "folder/a.jpg", b"a")
    (member,) = walk_bytes(tmp_path, stream.getvalue())
    assert member.name == "folder/a.jpg"


def test_every_cut_is_found(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    members = list(walk_tar(whole))
    end = members[-1].end
    borders = {b for m in members for b in (m.header, m.data, m.data + m.size, m.end)}
    borders |= {end + BLOCK, end + 2 * BLOCK, len(data)}
    borders |= set(range(end, len(data), BLOCK))
    cuts = {b + step for b in borders for step in (-1, 0, 1)}
    cuts |= set(random.Random(1).sample(range(len(data)), 200))
    cuts = {cut for cut in cuts if 0 <= cut < len(data)}
    path = tmp_path / "cut.tar"
    path.write_bytes(data)
    accepted = []
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        message = fault(path)
        if message is None:
            accepted.append(cut)
        else:
            assert message.startswith(str(path))
            assert cut < BLOCK or f"at byte {cut};" in message
    assert len(cuts) > 250
    # Exactly two zero blocks and no record padding: what many writers make, nothing is lost.
    assert accepted == [end + 2 * BLOCK]


def test_messages_of_cuts(whole: Path) -> None:
    member = list(walk_tar(whole))[5]
    size = whole.stat().st_size
    for cut, words in (
        (size - 1, "in its last record"),
        (member.end, "before its end mark, after member '005.jpg'"),
        (member.end - 1, "inside the padding of member '005.jpg'"),
        (member.data + member.size - 1, "inside the data of member '005.jpg'"),
        (member.data - 1, "inside a header, after member '004.jpg'"),
    ):
        os.truncate(whole, cut)
        assert f"{whole}: the file is cut {words}" in (fault(whole) or "")


# The lowest bit, those that make a digit of the checksum a blank or a control character, the sign.
@pytest.mark.parametrize("bit", [0, 4, 5, 7])
def test_every_flipped_header_byte_is_found(whole: Path, bit: int) -> None:
    members = list(walk_tar(whole))
    unseen = []
    with whole.open("r+b", buffering=0) as file:
        for header in (members[4].header, members[-1].header, members[-1].data - BLOCK):
            original = whole.read_bytes()[header : header + BLOCK]
            for place in range(BLOCK):
                file.seek(header + place)
                file.write(bytes([original[place] ^ 1 << bit]))
                message = fault(whole)
                if message is None:
                    assert list(walk_tar(whole)) == members
                    unseen.append(place)
                else:
                    assert f"at byte {header}" in message or members[-1].header < header
                file.seek(header)
                file.write(original)
    # In the field of the checksum a blank may stand for a leading zero or for the NUL behind it.
    assert set(unseen) <= {148, 154, 155}


def test_damage_in_the_middle_names_member_and_offset(whole: Path, tmp_path: Path) -> None:
    """The trap: tarfile takes this for the end of the archive, and says nothing."""
    data = bytearray(whole.read_bytes())
    members = list(walk_tar(whole))
    data[members[4].header] ^= 1
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 4
    found = []
    with pytest.raises(ShardError) as caught:
        found.extend(walk_tar(path))
    assert found == members[:4]
    for part in (
        str(path),
        "after member '003.jpg' is damaged",
        f"byte {members[4].header}",
        "again",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("blocks", [1, 2])
def test_zeroed_header_is_not_the_end(whole: Path, tmp_path: Path, blocks: int) -> None:
    data = bytearray(whole.read_bytes())
    start = list(walk_tar(whole))[5].header
    data[start : start + blocks * BLOCK] = bytes(blocks * BLOCK)
    with pytest.raises(ShardError, match="data follow the end mark"):
        walk_bytes(tmp_path, bytes(data))


def test_reserved_but_unfilled_tail_is_found(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    start = list(walk_tar(whole))[5].header
    with pytest.raises(ShardError, match="unfinished copy"):
        walk_bytes(tmp_path, data[:start] + bytes(len(data) - start))
    with pytest.raises(ShardError, match="unfinished copy"):
        walk_bytes(tmp_path, data + b"x")


@pytest.mark.parametrize("payload", [b"30 path=short.jpg\n", b"x path=a\n", b"8 path=a", b"0 a=\n"])
def test_damaged_pax_records(tmp_path: Path, payload: bytes) -> None:
    """tarfile drops malformed records, and the member would get its truncated name."""
    header = tarfile.TarInfo("PaxHeader/a")
    header.type = tarfile.XHDTYPE
    header.size = len(payload)
    data = header.tobuf(tarfile.USTAR_FORMAT) + payload.ljust(BLOCK, b"\0") + tar_bytes({"a": b""})
    with pytest.raises(ShardError, match=r"extended header after the start is damaged.*byte 0"):
        walk_bytes(tmp_path, data)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (b"M", "of the unknown type"),
    ],
)
def test_refused_types(tmp_path: Path, kind: bytes, words: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "a.jpg", b"a")
        add(tar, "b.jpg", type=kind, linkname="a.jpg")
    with pytest.raises(ShardError, match=rf"'b.jpg' at byte 1024 is {words}.*dereference"):
        walk_bytes(tmp_path, stream.getvalue())


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_sparse_members_are_refused(tmp_path: Path, tar_format: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(0)
        file.write(b"x")
    command = ["tar", "-C", str(tmp_path), "--sparse", f"--format={tar_format}"]
    made = subprocess.run(
        [*command, "-cf", str(tmp_path / "sparse.tar"), "hole.jpg"], capture_output=True
    )
    if made.returncode or (tmp_path / "sparse.tar").stat().st_size > 1 << 19:
        pytest.skip("this tar program or file system stores no sparse members")
    with pytest.raises(ShardError, match="is a sparse file"):
        list(walk_tar(tmp_path / "sparse.tar"))


@pytest.mark.parametrize(
    "name", ["/etc/a.jpg", "../a.jpg", "a/../../b.jpg", "a\nb.jpg", "\udcff.jpg"]
)
def test_refused_names(tmp_path: Path, name: str) -> None:
    data = tar_bytes({"ok.jpg": b"", name: b"x"}, tarfile.GNU_FORMAT)
    with pytest.raises(ShardError, match=r"name of member .* at byte 512 .*rename"):
        walk_bytes(tmp_path, data)


def test_global_header_that_resizes_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", pax_headers={"size": "5"}) as tar:
        add(tar, "a.jpg", b"a")
    with pytest.raises(ShardError, match="global header"):
        walk_bytes(tmp_path, stream.getvalue())


def test_negative_size_does_not_loop(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "a.jpg", b"", pax_headers={"size": "-1536"})
    with pytest.raises(ShardError, match="negative size"):
        walk_bytes(tmp_path, stream.getvalue())


def test_giant_long_name_is_not_loaded(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 1 << 40
    with pytest.raises(ShardError, match="extended header"):
        walk_bytes(tmp_path, header.tobuf(tarfile.GNU_FORMAT) + bytes(RECORD))


def test_endless_chain_of_long_names(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 2
    link = header.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(BLOCK, b"\0")
    with pytest.raises(ShardError, match="damaged"):
        walk_bytes(tmp_path, link * 2000 + tar_bytes({"a.jpg": b"a"}))


@pytest.mark.parametrize(
    ("start", "command"),
    [
        (b"\x1f\x8b\x08", "gzip -d"),
        (b"\x28\xb5\x2f\xfd", "zstd -d"),
        (b"BZh9", "bzip2 -d"),
        (b"\xfd7zXZ\x00", "xz -d"),
    ],
)
def test_compressed(tmp_path: Path, start: bytes, command: str) -> None:
    with pytest.raises(ShardError, match=f"decompress it first .`{command}`"):
        walk_bytes(tmp_path, start + noise(2000))


def test_no_tar_at_all(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="is empty"):
        walk_bytes(tmp_path, b"")
    with pytest.raises(ShardError, match="not a tar file"):
        walk_bytes(tmp_path, noise(5000))
    with pytest.raises(ShardError, match="not a tar file"):
        walk_bytes(tmp_path, b"short")
    with pytest.raises(ShardError, match="cannot be opened"):
        list(walk_tar(tmp_path / "missing.tar"))
    assert walk_bytes(tmp_path, bytes(RECORD)) == []


SMALL = tar_bytes({"a.jpg": noise(600), LONG: noise(3), "b.cls": b"1"})


@settings(max_examples=200, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SMALL) - 1), st.binary(min_size=1, max_size=12)), max_size=4
    ),
    length=st.integers(0, len(SMALL)),
    checksummed=st.booleans(),
)
def test_any_damage_is_a_shard_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[int, bytes]],
    length: int,
    checksummed: bool,
) -> None:
    """No other exception, no endless loop, and no member beyond the file."""
    data = bytearray(SMALL)
    for offset, patch in edits:
        data[offset : offset + len(patch)] = patch
    if checksummed:
        data = bytearray(_with_valid_checksums(data))
    try:
        members = walk_bytes(tmp_path_factory.getbasetemp(), bytes(data[:length]))
    except ShardError:
        return
    assert all(0 <= m.header < m.data <= m.data + m.size <= m.end <= length for m in members)


def _with_valid_checksums(data: bytearray) -> bytes:
    """Damage that the checksum does not show: every block that looks like a header gets its own."""
    for start in range(0, len(data) - BLOCK + 1, BLOCK):
        block = data[start : start + BLOCK]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % (sum(block) % 8**6)
    return bytes(data)
