"""Captions of videos: read from a file or from files beside the videos, and matched with the videos by path.

A caption's key is the end of a video's path below the folder given, with or without its extension: `two/clip.mp4`,
`two/clip`, `clip.mp4` or `clip`. The longest key that fits is taken; a key that begins with `./` is the whole path.
Accents may be composed or decomposed. What could mean two things is refused, never chosen.
"""

import csv
import io
import json
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5kernels.folder import list_names, read_whole
from k5kernels.latents.failures import ending, told
from k5kernels.latents.sources import Listing, Source

KEY_FIELDS = ("file_name", "path", "file", "video", "key")
CAPTION_FIELDS = ("caption", "text")
SIDECAR_SUFFIXES = (".txt", ".json")

Row = tuple[str, object]  # key, caption


class CaptionError(ValueError):
    """Captions that cannot be read, or that fit two videos; the message names the file or the key."""


def read_captions(file: str | os.PathLike[str]) -> dict[str, str]:
    """Key -> caption, of a JSON, JSONL or CSV file in UTF-8.

    JSON: an object, key -> caption, or a list of rows. JSONL: a row a line. CSV: a header, then rows. A row has one of
    KEY_FIELDS and one of CAPTION_FIELDS.

    Raises CaptionError where the file is something else, is empty, or has two captions for one key; OSError where it
    cannot be read.
    """
    file = Path(file)
    text = _read_text(str(file))
    readers = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if file.suffix.lower() not in readers:
        raise CaptionError(f"{file}: expected captions in a file named .json, .jsonl or .csv")
    captions: dict[str, str] = {}
    for key, caption in readers[file.suffix.lower()](file, text):
        normal = _nfc(key)
        if not normal.strip("./"):
            raise CaptionError(f"{file}: expected a video's path or name as key, got {key!r:.80}")
        words = _words(caption, f"{file}: {key!r:.80}")
        if captions.setdefault(normal, words) != words:
            raise CaptionError(f"{file}: {key!r:.80}: two captions; keep one")
    if not captions:
        raise CaptionError(f"{file}: expected captions, found none")
    return captions


def match_captions(captions: Mapping[str, str], sources: Iterable[str]) -> dict[str, str]:
    """Source -> caption, for the sources that have one. sources: paths of videos, with /.

    Raises CaptionError where a key fits several sources, or a source fits two keys alike with different captions.
    """
    normal = {_nfc(key): caption for key, caption in captions.items()}
    matched: dict[str, str] = {}
    fits = defaultdict(list)
    for source in dict.fromkeys(sources):
        keys = next(filter(None, ([key for key in alike if key in normal] for alike in _keys(source))), [])
        if len({normal[key] for key in keys}) > 1:
            raise CaptionError(f"captions: {source}: {_quoted(keys)} have different captions; keep one of them")
        for key in keys:
            matched[source] = normal[key]
            fits[key].append(source)
    for key, several in fits.items():
        if len(several) > 1:
            raise CaptionError(
                f"captions: {key!r:.80} fits {_quoted(several)}; give captions by path below the folder, "
                "the whole path as ./…"
            )
    return matched


def sidecar_captions(files: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(source -> caption, source -> why what stands beside it cannot be its caption).

    A caption stands in `clip.txt` or `clip.mp4.txt`, alone, or in `clip.json` or `clip.mp4.json`, an object with
    `caption`; a JSON object without one is about something else and passed over. It cannot be used where the file is
    damaged or cannot be read, where two captions of a video differ, and where one fits two videos.

    files: source -> path of its file. Raises OSError where what fails would fail for every source (no open files).
    """
    folders = _Folders()
    found: dict[str, dict[str, str]] = {}
    problems: dict[str, str] = {}
    for source, file in files.items():
        try:
            found[source] = _beside(file, folders)
        except CaptionError as error:
            problems[source] = str(error)
        except OSError as error:
            if ended := ending(error, file):
                raise ended from error
            problems[source] = f"{error.filename or file}: {told(error)}"
    owners = defaultdict(list)
    for source, captions in found.items():
        for path in captions:
            owners[path].append(source)
    for path, sources in owners.items():
        for source in sources if len(sources) > 1 else ():
            named = os.path.basename(files[source]) + os.path.splitext(path)[1]
            fits = _quoted(os.path.basename(files[one]) for one in sources)
            problems[source] = f"{path} fits {fits}; name it {named} if it is of this one"
    usable = {source: captions for source, captions in found.items() if captions and source not in problems}
    return {source: next(iter(captions.values())) for source, captions in usable.items()}, problems


@dataclass(frozen=True)
class Captions:
    """captions: file -> caption. problems: file -> why what stands beside it cannot be its caption."""

    captions: dict[str, str]
    problems: dict[str, str]


def captions_of(listing: Listing, mine: list[Source], given: Mapping[str, str] | None) -> Captions:
    """Those of the sources in `mine`: given ones, and for the others those beside them. Whether a caption fits two
    sources is asked of all that are listed. Raises CaptionError where some are given and none fits."""
    matched = match_captions(given or {}, [source.path for source in listing.sources])
    if given and listing.sources and not matched:
        raise CaptionError(f"captions: expected some for {listing.sources[0].path} and so on, got none that fits")
    captions = {source.file: matched[source.path] for source in mine if source.path in matched}
    open_files = {source.file for source in mine} - set(captions)
    stems = {os.path.splitext(file)[0] for file in open_files}
    near = (source.file for source in listing.sources if os.path.splitext(source.file)[0] in stems)
    beside, problems = sidecar_captions({file: file for file in near})
    captions |= {file: words for file, words in beside.items() if file in open_files}
    return Captions(captions, {file: why for file, why in problems.items() if file in open_files})


def _beside(file: str, folders: "_Folders") -> dict[str, str]:
    """Path -> caption, the same one, of the files beside a video; empty where there are none."""
    for names in _sidecar_names(file):
        if found := {path: words for path in folders.paths(file, names) if (words := _sidecar(path)) is not None}:
            if len(set(found.values())) > 1:
                raise CaptionError(f"{_quoted(found)} have different captions; keep one of them")
            return found
    return {}


class _Folders:
    """Names of the files in folders, each listed once: name in normal form -> names on disk."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, list[str]]] = {}

    def paths(self, file: str, names: Iterable[str]) -> list[str]:
        folder = os.path.dirname(file)
        if folder not in self._listed:
            listed = defaultdict(list)
            for name in list_names(folder or "."):
                listed[_nfc(name)].append(name)
            self._listed[folder] = listed
        return [os.path.join(folder, found) for name in names for found in self._listed[folder].get(_nfc(name), [])]


def _sidecar_names(file: str) -> Iterator[list[str]]:
    """First those that name the video's extension too, then those that do not."""
    name = os.path.basename(file)
    for base in (name, os.path.splitext(name)[0]):
        yield [base + suffix for suffix in SIDECAR_SUFFIXES]


def _sidecar(path: str) -> str | None:
    text = _read_text(path)
    if not path.endswith(".json"):
        return _words(text, path)
    parsed = _parse(text, path)
    if not isinstance(parsed, dict):
        raise CaptionError(f"{path}: expected a JSON object with `caption`, got {type(parsed).__name__}")
    return _words(parsed["caption"], path) if "caption" in parsed else None


def _keys(source: str) -> Iterator[list[str]]:
    """Keys that fit a source, the most particular first; those that fit alike stand together."""
    parts = _nfc(source).split("/")
    ends = ["./" + "/".join(parts), *("/".join(parts[first:]) for first in range(len(parts)))]
    for end in ends:
        yield list(dict.fromkeys((end, posixpath.splitext(end)[0])))


def _json_rows(file: Path, text: str) -> Iterator[Row]:
    parsed = _parse(text, str(file), object_pairs_hook=list)
    if not isinstance(parsed, list):
        raise CaptionError(f"{file}: expected a JSON object, key -> caption, or a list of rows")
    # Objects come as lists of pairs, so that a key that occurs twice is seen.
    if all(isinstance(pair, tuple) for pair in parsed):
        yield from parsed
        return
    for number, row in enumerate(parsed, start=1):
        yield _row(row, f"{file}: row {number}")


def _jsonl_rows(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}: line {number}"
            yield _row(_parse(line, where, object_pairs_hook=list), where)


def _csv_rows(file: Path, text: str) -> Iterator[Row]:
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        for cells in reader:
            if len(cells) != len(header) and cells:
                raise CaptionError(f"{file}: line {reader.line_num}: expected {len(header)} cells, got {len(cells)}")
            if cells:
                yield _row(list(zip(header, cells, strict=True)), f"{file}: line {reader.line_num}")
    except csv.Error as error:
        raise CaptionError(f"{file}: not CSV ({error})") from error


def _row(pairs: object, where: str) -> Row:
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    fields = pairs if isinstance(pairs, list) and is_object else []
    keys = [value for name, value in fields if name in KEY_FIELDS]
    captions = [value for name, value in fields if name in CAPTION_FIELDS]
    if len(keys) != 1 or len(captions) != 1 or not isinstance(keys[0], str):
        raise CaptionError(f"{where}: expected one of {', '.join(KEY_FIELDS)}, and one of {', '.join(CAPTION_FIELDS)}")
    return keys[0], captions[0]


def _read_text(file: str) -> str:
    try:
        return read_whole(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(f"{file}: expected text in UTF-8, byte {error.start} is none; convert it") from error


def _parse(text: str, where: str, **options: Any) -> Any:
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"{where}: expected a JSON of captions, got no JSON ({error})") from error


def _words(caption: object, where: str) -> str:
    """The caption on one line."""
    words = " ".join(caption.split()) if isinstance(caption, str) else ""
    if not words:
        got = "an empty one" if isinstance(caption, str) else type(caption).__name__
        raise CaptionError(f"{where}: expected a caption, got {got}")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise CaptionError(
            f"{where}: expected a caption of characters, got half of one (\\ud800 to \\udfff)"
        ) from error
    return words


def _nfc(name: str) -> str:
    """The form in which names are compared: accents composed."""
    return unicodedata.normalize("NFC", name)


def _quoted(names: Iterable[str]) -> str:
    shown = list(names)
    return " and ".join(f"`{name}`" for name in shown[:3]) + (", …" if len(shown) > 3 else "")
