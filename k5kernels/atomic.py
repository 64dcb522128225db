"""Files that are either whole or not there, also after the machine lost power."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The answers of a network share that cannot flush a folder, and of a folder that may be written but not read.
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Path to write to, `<path>.partial`: it replaces `path` when the block ends and is removed when it fails.

    The file is on disk before it gets its name, and the name is on disk when this returns, so a file written later
    never outlives an earlier one in a power cut. It gets the mode that `open` would give it: the former file's, or
    that of a new file under the process' umask. A link is followed. A killed process leaves at most the `.partial`
    file, which the next one overwrites.

    Raises OSError with `path` in it where the file cannot be written, also where the block's own error names no file,
    as that of a full disk.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = (path if path.exists() else partial).stat().st_mode & 0o777
        yield partial
        # Some writers put a file of their own in the place of the one that was made above.
        partial.chmod(mode)
        _flush(partial)
        os.replace(partial, path)
        flush_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first error is the one to tell
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where its file system can do that."""
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
