"""Which errors are one source's, and which would be every source's: those end a job."""

import errno
import os

import torch

# No memory, no threads, no open files, no room on the disk, no network: what comes next would fail too.
ENDING = frozenset(
    {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENETUNREACH}
)
# How PyTorch and Python say so without a number.
ENDING_WORDS = {
    "can't start new thread": errno.EAGAIN,
    "can't allocate memory": errno.ENOMEM,
    "out of memory": errno.ENOMEM,
    "CUDA error": errno.EIO,
}


def ending(error: BaseException, path: str) -> OSError | None:
    """The error as one of the system that names the path, where the next source would fail by it too; else None."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), path)
    if isinstance(error, OSError) and error.errno in ENDING:
        return OSError(error.errno, error.strerror or os.strerror(error.errno), error.filename or path)
    if isinstance(error, RuntimeError):
        for words, number in ENDING_WORDS.items():
            if words in str(error):
                return OSError(number, str(error), path)
    return None


def told(error: Exception) -> str:
    """What an error of one source says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
