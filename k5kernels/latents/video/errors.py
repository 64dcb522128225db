"""What goes wrong with a video file: the fault of its content, or of the system that reads it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

# Errors by which FFmpeg says that the content is wrong: as arguments that do not fit, numbers out of range, features
# it has not.
CONTENT_ERRNOS = frozenset({errno.EINVAL, errno.ERANGE, errno.EDOM, errno.ENOSYS, errno.EOPNOTSUPP})
# FFmpeg's own errors (invalid data, no such decoder, …) have four-letter numbers, far above any errno.
OWN_ERRORS = 1 << 16
SPARE_BYTES = 1 << 28


class VideoError(ValueError):
    """A file whose content is no video we can use, or one we cannot write; the message says what would do.

    The same file gives the same error again. What may pass (no memory, too many open files, no permission, a network
    that is gone) is an OSError instead.
    """


@contextmanager
def translated(path: str | Path) -> Iterator[None]:
    """FFmpeg's errors inside the block become VideoError where the content causes them, else OSError with the path."""
    try:
        yield
    except av.FFmpegError as error:
        number = error.errno or 0
        if number == errno.ENOMEM and _memory_is_left():
            found = "found one that asks for too much memory"
            raise VideoError(f"{path}: expected a readable video file, {found}") from error
        if number >= OWN_ERRORS or number in CONTENT_ERRNOS:
            raise VideoError(f"{path}: expected a readable video file ({error.strerror or error})") from error
        raise OSError(number, error.strerror, str(path)) from error
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _memory_is_left() -> bool:
    """Whether a large piece of memory can be had: if so, what could not be had was asked for by a broken file."""
    try:
        bytearray(SPARE_BYTES)
    except MemoryError:
        return False
    return True
