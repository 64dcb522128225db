"""Errors of object stores (s3://…), which are none of the system's or have no number, as those of the system."""

import errno
import os

PACKAGES = frozenset({"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "requests", "urllib3"})
# Words of an error -> what to do about it.
ADVICE = {
    "credentials": "for S3 set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "connect": "check the network and, for a server of your own, AWS_ENDPOINT_URL",
    "bucket does not exist": "make it, or give another",
    "denied": "listing, reading, writing and deleting must be allowed there",
    "forbidden": "listing, reading, writing and deleting must be allowed there",
}
UNREACHABLE = "could not connect"
# The system's numbers of errors that come without one.
NUMBERS: tuple[tuple[type[OSError], int], ...] = (
    (PermissionError, errno.EACCES),
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (TimeoutError, errno.ETIMEDOUT),
    (ConnectionError, errno.ECONNRESET),
)


def is_of_a_store(error: Exception) -> bool:
    """Whether an error that is none of the system's comes from the package of a store, or of its network."""
    return type(error).__module__.partition(".")[0] in PACKAGES


def store_error(error: Exception, path: str) -> OSError:
    """The error as one of the system, with a number and the path, and with what to do about it where that is known."""
    number = error.errno if isinstance(error, OSError) else None
    words = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if UNREACHABLE in words.lower():
        number = errno.ENETUNREACH
    number = number or next((number for kind, number in NUMBERS if isinstance(error, kind)), errno.EIO)
    if words.strip("/") in path:  # all that fsspec says of what is not there
        words = os.strerror(number)
    advice = next((advice for known, advice in ADVICE.items() if known in words.lower()), None)
    return OSError(number, words if advice is None else f"{words.rstrip('.')}; {advice}", path)
