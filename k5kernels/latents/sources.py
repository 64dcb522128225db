"""The videos and pictures that a job is given: which files, by which names, with which content.

They are on a local disk, or wherever fsspec reaches (s3://…); there are no links and devices there.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from k5kernels.folder import filesystem_of, is_url, naming
from k5kernels.latents.failures import ending, told

VIDEOS_AND_PICTURES = """
.3g2 .3gp .amv .apng .asf .avi .avif .bmp .dv .f4v .flv .gif .h264 .heic .hevc .jpeg .jpg .m2ts .m4v .mjpeg .mkv .mov
.mp4 .mpeg .mpg .mts .mxf .nut .obu .ogm .ogv .png .qt .rm .rmvb .tif .tiff .ts .vob .webm .webp .wmv .y4m
"""
OTHERS = """
.aac .ass .cfg .csv .db .flac .gz .htm .html .ini .json .jsonl .log .m3u .m3u8 .md .md5 .mp3 .nfo .npy .npz .ogg
.parquet .part .partial .pdf .pickle .pt .pth .py .pyc .safetensors .sh .sha256 .sqlite .srt .sub .tar .tmp .toml .tsv
.txt .vtt .wav .xml .yaml .yml .zip
"""
# What a file is, the decoder says. One in a folder that is named like a video and cannot be used is a failure; one that
# is named otherwise and holds none is left out.
MEDIA_SUFFIXES = frozenset(VIDEOS_AND_PICTURES.split())
# Files that stand beside videos and hold none: known by name, to spare opening 100,000 captions.
OTHER_SUFFIXES = frozenset(OTHERS.split())
# What macOS writes beside files on foreign disks.
APPLE_DOUBLE = "._"
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
HASH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A file to encode.

    file: how it is opened, a path or a URL. path: below what was given, with /: its name in manifest and shards.
    bytes: its size. named: whether it was given by its own name, rather than found in a folder.
    """

    file: str
    path: str
    bytes: int = 0
    named: bool = False

    @property
    def is_expected(self) -> bool:
        """Whether it must be a video or a picture, by how it was given or what it is called."""
        return self.named or suffix(self.path) in MEDIA_SUFFIXES


@dataclass
class Listing:
    """What was found. sources: in the order of their paths. failures: file or folder -> why it cannot be listed.

    left_out: file or folder -> why nothing is lost by it. others: suffix -> how many files have it, which by it hold no
    video.
    """

    sources: list[Source] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)


def find_sources(paths: Iterable[str | Path], exclude: str | Path | None = None) -> Listing:
    """Files as given, and for a folder every file in it, at any depth, that may hold a video or a picture.

    Links are followed, and no folder is walked twice. exclude: a folder that is not walked. Both may be URLs.
    Raises ValueError where nothing is found, OSError where no file could be listed.
    """
    walk = _Walk(exclude)
    given = list(dict.fromkeys(os.fspath(path) for path in paths))
    files = [path for path in given if not (walk.remote(path) if is_url(path) else walk.is_folder(path))]
    walk.links()
    for path in files:
        walk.named(path)
    listing = walk.listing
    if not (listing.sources or listing.failures):
        where = f" in {', '.join(given)}" if given else ""
        raise ValueError(f"paths: expected video files, pictures or folders with some, found none{where}")
    listing.sources.sort(key=lambda source: source.path.split("/"))
    return listing


def is_of_share(path: str, index: int, of: int) -> bool:
    """Whether the source of this path is encoded by process `index` of `of`.

    By the path alone, so that every process knows it without the others, and whatever else there is.
    """
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") % of == index


def content_hash(file: str) -> str:
    """sha256 of a file's bytes, in hex. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with naming(file), open(file, "rb", buffering=0) as opened:
        while block := opened.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


class _Walk:
    """Folders on the way into a listing. Links come last, so that a file in a given folder keeps its own name."""

    def __init__(self, exclude: str | Path | None) -> None:
        self.listing = Listing()
        self._folders: dict[tuple[int, int], str] = {}
        self._files: dict[tuple[int, int], str] = {}
        self._links: list[tuple[str, str]] = []
        self._excluded_url = str(exclude) if is_url(str(exclude)) else None
        if exclude is not None and self._excluded_url is None:
            with suppress(FileNotFoundError, NotADirectoryError):
                self._folders[_number(os.stat(exclude))] = "the one to write to"

    def is_folder(self, path: str) -> bool:
        """Whether a given path is a folder, which is then walked, or cannot be asked, which is a failure."""
        with self._failing(path):
            if not stat.S_ISDIR(os.stat(path).st_mode):
                return False
            self.folder(path, "")
        return True

    def remote(self, url: str) -> bool:
        """All that a URL stands for. True: nothing is left to be done."""
        filesystem, root = filesystem_of(url)
        with self._failing(url), naming(url):
            if (info := filesystem.info(root))["type"] == "file":
                self.listing.sources.append(Source(url, url.rsplit("/", 1)[-1], info["size"], named=True))
                return True
            excluded = None if self._excluded_url is None else filesystem_of(self._excluded_url)
            for name, found in sorted(filesystem.find(root, detail=True).items()):
                path = name[len(root.rstrip("/")) + 1 :]
                if excluded is not None and excluded[0] == filesystem and name.startswith(f"{excluded[1]}/"):
                    continue
                if suffix(path) in OTHER_SUFFIXES or path.rsplit("/", 1)[-1].startswith(APPLE_DOUBLE):
                    self._count_other(path)
                else:
                    self.listing.sources.append(Source(f"{url.rstrip('/')}/{path}", path, found["size"]))
        return True

    def folder(self, root: str, path: str) -> None:
        """All that is below a folder, of which the paths begin with `path`."""
        waiting = [(root, path)]
        while waiting:
            folder, path = waiting.pop()
            with self._failing(folder):
                number = _number(os.stat(folder))
                if number in self._folders:
                    self.listing.left_out[folder] = f"{folder}: the same folder as {self._folders[number]}"
                    continue
                self._folders[number] = folder
                with os.scandir(folder) as entries:
                    found = list(entries)
                for entry in found:
                    with self._failing(entry.path):
                        self._entry(entry, path + entry.name, waiting)

    def links(self) -> None:
        """What lies behind the links that were met, and behind those that are met there."""
        while self._links:
            links, self._links = sorted(self._links), []
            for file, path in links:
                with self._failing(file):
                    self._link(file, path)

    def named(self, file: str) -> None:
        """A file that was given by its name."""
        with self._failing(file):
            status = os.stat(file)
            if _number(status) not in self._files:
                self._take(file, os.path.basename(file), status, named=True)

    def _entry(self, entry: os.DirEntry[str], path: str, waiting: list[tuple[str, str]]) -> None:
        if entry.is_symlink():
            self._links.append((entry.path, path))
        elif entry.is_dir(follow_symlinks=False):
            waiting.append((entry.path, f"{path}/"))
        elif suffix(entry.name) in OTHER_SUFFIXES or entry.name.startswith(APPLE_DOUBLE):
            self._count_other(entry.name)
        else:
            self._take(entry.path, path, entry.stat(follow_symlinks=False))

    def _link(self, file: str, path: str) -> None:
        try:
            status = os.stat(file)
        except OSError as error:
            if error.errno not in NOWHERE:
                raise
            expected = Source(file, path).is_expected
            listed = self.listing.failures if expected else self.listing.left_out
            listed[file] = f"{file}: a link that leads nowhere ({error.strerror})"
            return
        if stat.S_ISDIR(status.st_mode):
            self.folder(file, f"{path}/")
        elif suffix(path) in OTHER_SUFFIXES:
            self._count_other(path)
        elif (other := self._files.get(_number(status))) is not None:
            self.listing.left_out[file] = f"{file}: a link to {other}, which is taken"
        else:
            self._take(file, path, status)

    def _take(self, file: str, path: str, status: os.stat_result, named: bool = False) -> None:
        if not stat.S_ISREG(status.st_mode):
            self.listing.left_out[file] = f"{file}: a device, pipe or socket"
            return
        self._files[_number(status)] = file
        self.listing.sources.append(Source(file, path, status.st_size, named))

    def _count_other(self, name: str) -> None:
        ending = suffix(name)
        self.listing.others[ending] = self.listing.others.get(ending, 0) + 1

    @contextmanager
    def _failing(self, path: str) -> Iterator[None]:
        """An error in the block is noted, and the walk goes on, unless it would fail everywhere."""
        try:
            yield
        except OSError as error:
            if ended := ending(error, path):
                raise ended from error
            self.listing.failures[path] = f"{path}: {told(error)}"


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
