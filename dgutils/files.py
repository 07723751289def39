"""Files that are written whole or not at all, checksums, locks, and what disks complain of, in one line."""

import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, SoftFileLock, Timeout

from dgutils.errors import UserError

FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def digest_of_file(path: Path | str) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file whose name only ever shows the old or the whole new content, even after a power cut."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        temporary.write_bytes(data)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def save_array(path: Path, array: np.ndarray) -> None:
    """np.save by way of memory, because NumPy's own short writes on a full disk carry no error number."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.write_bytes(buffer.getbuffer())


def sync(path: Path) -> None:
    """Have the kernel put a file, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that refuses writing, into one line; other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # any: on a full disk safetensors and NumPy raise errors of their own
        number, name = getattr(error, "errno", None), str(getattr(error, "filename", None) or root)
        if number in FULL_DISK or re.search(r"No space left|\d requested and \d+ written", str(error)):
            raise UserError(f"no space left under {root}: free some and run again;"
                            " what is done is kept") from error
        if number in NOT_WRITABLE and (Path(name).is_relative_to(root) or root.is_relative_to(name)):
            raise UserError(f"cannot read and write under {root} ({os.strerror(number).lower()}): make it a"
                            " folder where you can, or choose another one") from error
        raise


@contextmanager
def lock(path: Path, wait: bool, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold an exclusive lock that ends with the process. If it is busy and not `wait`, yields False at once.

    It is the kernel's (flock); where the file system has none, as Lustre and NFS may, it is a file that names its
    holder, and that others on the same machine remove once the holder is dead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for held in (FileLock(path, fallback_to_soft=False), SoftFileLock(path.with_suffix(".held"))):
        try:
            held.acquire(timeout=0)
            break
        except Timeout:
            if not wait:
                yield False
                return
            log(f"WAIT {path.stem}: another process is computing it")
            held.acquire()
            break
        except OSError as error:
            if error.errno not in NO_LOCKS or isinstance(held, SoftFileLock):
                raise
    try:
        yield True
    finally:
        held.release()
