"""Which units are committed: lease, commit, promote, recover.

A unit's files are staged, read back and hashed; then a marker ``_ledger/<unit>.json`` is created
that only one attempt can create (the commit point); then the files are moved into place, and moved
again on resume should a crash have come between. Readers look at committed units only. Leases keep
two processes from working on one unit, but nothing depends on them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from classlens.extractor.errors import StoreError
from classlens.extractor.schema import STAGING_DIR, ledger_file


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of one file of a unit."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class UnitRecord:
    """What a commit marker says.

    files: by path relative to the store. status: number of images by status name. saturated:
    logits and log-probabilities clipped to the range of float16. time: seconds and moment, the only
    part that differs between two runs.
    """

    unit: int
    images: int
    status: Mapping[str, int]
    saturated: int
    files: Mapping[str, FileFacts]
    time: Mapping[str, Any] = field(default_factory=dict)


def read_record(store: Path, unit: int) -> UnitRecord:
    """A unit's commit marker.

    Raises:
        StoreError: the marker is unreadable or its own checksum does not match.
    """
    path = store / ledger_file(unit)
    try:
        body = json.loads(path.read_text())
        checksum = body.pop("checksum")
        if checksum != _checksum(body):
            raise ValueError("its checksum does not match")
        files = {name: FileFacts(**facts) for name, facts in body.pop("files").items()}
        return UnitRecord(**body, files=files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"The commit marker {path} is damaged ({error}); run `classlens verify --repair` and "
            "extract again."
        ) from error


def commit(store: Path, record: UnitRecord) -> bool:
    """Creates the commit marker; False when another attempt has committed the unit before."""
    body = {
        "unit": record.unit,
        "images": record.images,
        "status": dict(record.status),
        "saturated": record.saturated,
        "files": {n: {"bytes": f.bytes, "sha256": f.sha256} for n, f in record.files.items()},
        "time": dict(record.time),
    }
    body["checksum"] = _checksum(body)
    marker = store / ledger_file(record.unit)
    marker.parent.mkdir(exist_ok=True)
    draft = store / STAGING_DIR / f"{marker.stem}-{uuid.uuid4().hex[:8]}.json"
    draft.write_text(json.dumps(body, indent=1))
    sync(draft)
    try:
        os.link(draft, marker)  # fails if the marker exists, and is whole from the first moment
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    sync(marker.parent)
    return True


def promote(store: Path, staging: Path, record: UnitRecord) -> None:
    """Moves the staged files of a committed unit into place."""
    for name in record.files:
        target = store / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target)
        sync(target.parent)


def recover(store: Path, unit: int) -> bool:
    """Finishes the promotion of a committed unit after a crash.

    Returns:
        whether every file is in place. If one is lost for good, the marker is taken back, so that
        the unit counts as not yet extracted.
    """
    record = read_record(store, unit)
    for name, facts in record.files.items():
        target = store / name
        if target.is_file() and target.stat().st_size == facts.bytes:
            continue
        for attempt in staging_attempts(store, unit):
            staged = attempt / name
            if staged.is_file() and file_facts(staged) == facts:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, target)
                sync(target.parent)
                break
        else:
            withdraw(store, unit)
            return False
    return True


def withdraw(store: Path, unit: int) -> None:
    """Takes a commit marker back; the unit will be extracted again."""
    (store / ledger_file(unit)).unlink()
    sync((store / ledger_file(unit)).parent)


@contextmanager
def lease(store: Path, unit: int) -> Iterator[Path | None]:
    """A staging folder for one attempt at a unit; None where another process has the unit.

    The lease ends with the process, however that ends. Leftovers of dead attempts are cleared.
    """
    lock = store / STAGING_DIR / f"{unit:06d}.lock"
    file = _locked(lock)
    if file is None:
        yield None
        return
    with file:
        done = (store / ledger_file(unit)).exists() and recover(store, unit)
        _clear(store, unit)
        if done:
            lock.unlink()
            yield None
            return
        attempt = store / STAGING_DIR / f"{unit:06d}-{uuid.uuid4().hex[:8]}"
        attempt.mkdir()
        yield attempt
        _clear(store, unit)
        lock.unlink()


def staging_attempts(store: Path, unit: int) -> list[Path]:
    """The staging folders of a unit, of whatever attempt."""
    return [p for p in (store / STAGING_DIR).glob(f"{unit:06d}-*") if p.is_dir()]


def close_staging(store: Path) -> None:
    """Removes the staging area if nobody uses it."""
    try:
        (store / STAGING_DIR).rmdir()
    except OSError as error:  # another process uses it, or has removed it
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def file_facts(path: Path) -> FileFacts:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileFacts(path.stat().st_size, digest)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(lock: Path) -> IO[str] | None:
    """The lock file, open and locked until it is closed; None where another process has it."""
    while True:
        with suppress(FileExistsError):
            lock.parent.mkdir()
        try:
            file = lock.open("w")
        except FileNotFoundError:  # another process has closed the staging area since
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()  # its holder has removed it since: this lock would keep nobody out


def _clear(store: Path, unit: int) -> None:
    for leftover in (store / STAGING_DIR).glob(f"{unit:06d}-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
