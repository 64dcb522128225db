"""Captions reach the video they are of, whatever form their names have, and are never guessed."""

import errno
import json
import os
import re
import unicodedata

import pytest

from k5kernels.latents.captions import CaptionError, match_captions, read_captions, sidecar_captions

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café/été.mp4") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("two/clip.mp4", "two/clip.mp4"),
        ("two/clip", "two/clip.mp4"),
        ("clip.mp4", "two/clip.mp4"),
        ("clip", "two/clip.mp4"),
        ("./two/clip.mp4", "two/clip.mp4"),
        ("./two/clip", "two/clip.mp4"),
        ("two/clip.mp4", "/home/someone/two/clip.mp4"),
        ("clip.v2", "clip.v2.mp4"),
        (COMPOSED, DECOMPOSED),
        (DECOMPOSED, COMPOSED),
        (DECOMPOSED.removesuffix(".mp4"), COMPOSED),
    ],
)
def test_a_key_is_the_end_of_the_path_with_or_without_extension(key, source):
    assert match_captions({key: "a cat"}, [source]) == {source: "a cat"}


@pytest.mark.parametrize("key", ["lip.mp4", "wo/clip.mp4", "one/clip", "two", "clip.mkv", "CLIP", "./clip.mp4"])
def test_other_keys_fit_not(key):
    assert match_captions({key: "a cat"}, ["two/clip.mp4"]) == {}


def test_videos_of_one_name_in_two_folders_have_their_own_captions_by_path():
    captions = {"one/clip.mp4": "a cat", "two/clip": "a dog", "clip": "another"}
    sources = ["one/clip.mp4", "two/clip.mp4", "three.mp4"]
    assert match_captions(captions, sources) == {"one/clip.mp4": "a cat", "two/clip.mp4": "a dog"}


def test_the_longest_key_goes_first_and_leaves_the_short_one_to_the_other_video():
    captions = {"clip": "a cat", "two/clip": "a dog"}
    assert match_captions(captions, ["one/clip.mp4", "two/clip.mp4"]) == {
        "one/clip.mp4": "a cat",
        "two/clip.mp4": "a dog",
    }


def test_a_whole_path_tells_a_video_from_those_below_it():
    assert match_captions({"./clip.mp4": "a cat"}, ["clip.mp4", "two/clip.mp4"]) == {"clip.mp4": "a cat"}


@pytest.mark.parametrize(
    ("captions", "sources", "words"),
    [
        ({"clip": "x"}, ["one/clip.mp4", "two/clip.mp4"], "'clip' fits `one/clip.mp4` and `two/clip.mp4`"),
        ({"clip.mp4": "x"}, ["clip.mp4", "two/clip.mp4"], "the whole path as"),
        ({"clip": "x"}, ["clip.mp4", "clip.mkv"], "fits `clip.mp4` and `clip.mkv`"),
        ({COMPOSED: "x"}, [COMPOSED, DECOMPOSED], "fits"),
        ({"clip": "x", "clip.mp4": "y"}, ["clip.mp4"], "`clip.mp4` and `clip` have different captions"),
    ],
)
def test_what_could_mean_two_things_is_refused(captions, sources, words):
    with pytest.raises(CaptionError, match=words):
        match_captions(captions, sources)


def test_a_source_of_many_clips_is_one_source():
    assert match_captions({"clip": "x"}, ["clip.mp4"] * 5) == {"clip.mp4": "x"}


ROWS = [{"file_name": "one/clip.mp4", "caption": "a  cat\n"}, {"file_name": "b.mp4", "caption": "a “dog”, large"}]
EXPECTED = {"one/clip.mp4": "a cat", "b.mp4": "a “dog”, large"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.json", json.dumps({row["file_name"]: row["caption"] for row in ROWS}, ensure_ascii=False)),
        ("c.json", "\ufeff" + json.dumps({row["file_name"]: row["caption"] for row in ROWS})),
        ("c.json", json.dumps(ROWS)),
        ("c.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("c.csv", 'file_name,caption,seconds\none/clip.mp4,"a  cat\n",3\nb.mp4,"a “dog”, large",4\n'),
        ("c.CSV", 'text,path\r\na cat,one/clip.mp4\r\n\r\n"a “dog”, large",b.mp4\r\n'),
    ],
)
def test_captions_are_read_from_json_lines_and_csv(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_captions(tmp_path / name) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", b"", "got no JSON"),
        ("c.json", b"{", "got no JSON"),
        ("c.json", b"[" * 100_000, "got no JSON"),
        ("c.json", b'"words"', "expected a JSON object, key -> caption, or a list of rows"),
        ("c.json", b"{}", "expected captions, found none"),
        ("c.json", b"[1]", "row 1: expected one of file_name"),
        ("c.json", b'{"a": 1}', "'a': expected a caption, got int"),
        ("c.json", b'{"a": " "}', "'a': expected a caption, got an empty one"),
        ("c.json", b'{"a": "x", "a": "y"}', "'a': two captions; keep one"),
        ("c.json", b'{"caf\\u00e9": "x", "cafe\\u0301": "y"}', "two captions; keep one"),
        ("c.json", b'{"": "x"}', "expected a video's path or name as key"),
        ("c.json", b'{"a": "\\ud800"}', "expected a caption of characters"),
        ("c.json", b'{"a": "caf\xe9"}', "expected text in UTF-8, byte 10"),
        ("c.json", '{"a": "x"}'.encode("utf-16"), "expected text in UTF-8"),
        ("c.jsonl", b'{"file": "a", "caption": "x"}\n{"file": "b"}', "line 2: expected one of"),
        ("c.jsonl", b'{"file": "a", "path": "b", "caption": "x"}', "line 1: expected one of"),
        ("c.jsonl", b"words", "line 1: expected a JSON"),
        ("c.csv", b"", "expected captions, found none"),
        ("c.csv", b"file,caption\na\n", "line 2: expected 2 cells, got 1"),
        ("c.csv", b"name,caption\na,b\n", "line 2: expected one of"),
        ("c.csv", b'file,caption\na,"b\n', "not CSV"),
        ("c.txt", b"x", "named .json, .jsonl or .csv"),
    ],
)
def test_files_that_are_none_are_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CaptionError) as caught:
        read_captions(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def beside(folder, **files):
    """Captions of the videos in the folder, with those files beside them, and what is wrong with others."""
    videos = {}
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if path.suffix in (".mp4", ".mkv"):
            videos[path.relative_to(folder).as_posix()] = str(path)
    return sidecar_captions(videos)


@pytest.mark.parametrize(
    "files",
    [
        {"clip_txt": "a cat\n"},
        {"clip_mp4_txt": "a cat"},
        {"clip_json": '{"caption": "a cat", "fps": 24}'},
        {"clip_mp4_json": '{"caption": "a cat"}'},
        {"clip_txt": "a cat", "clip_json": '{"caption": "a  cat"}'},
        {"clip_txt": "a cat", "clip_json": '{"title": "x"}'},
        {"clip_mp4_txt": "a cat", "clip_txt": "of another video"},
        {"clip_txt": "\ufeffa cat"},
    ],
)
def test_a_caption_beside_the_video_is_found(tmp_path, files):
    assert beside(tmp_path, clip_mp4="", **files) == ({"clip.mp4": "a cat"}, {})


def test_a_video_without_a_caption_beside_it_has_none(tmp_path):
    assert beside(tmp_path, clip_mp4="", other_txt="a dog", clip_json='{"title": "x"}') == ({}, {})


def test_each_folder_has_its_own_captions_beside_the_videos(tmp_path):
    files = {"one__clip_mp4": "", "two__clip_mp4": "", "one__clip_txt": "a cat", "two__clip_txt": "a dog"}
    assert beside(tmp_path, **files) == ({"one/clip.mp4": "a cat", "two/clip.mp4": "a dog"}, {})


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_caption_beside_the_video_is_found_in_either_form_of_its_accents(tmp_path, forms):
    video, caption = (unicodedata.normalize(form, "été") for form in forms)
    assert beside(tmp_path, **{f"{video}_mp4": "", f"{caption}_txt": "summer"}) == ({f"{video}.mp4": "summer"}, {})


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"clip_mkv": "", "clip_txt": "whose?"}, r"clip\.txt fits `clip\.mp4` and `clip\.mkv`; name it clip\.mp4\.txt"),
        ({"clip_txt": "a cat", "clip_json": '{"caption": "a dog"}'}, "have different captions"),
        ({"clip_txt": " \n"}, r"clip\.txt: expected a caption, got an empty one"),
        ({"clip_txt": b"caf\xe9"}, r"clip\.txt: expected text in UTF-8"),
        ({"clip_json": "{"}, r"clip\.json: .*no JSON"),
        ({"clip_json": "[]"}, r"clip\.json: expected a JSON object with `caption`, got list"),
        ({"clip_json": '{"caption": 3}'}, r"clip\.json: expected a caption, got int"),
    ],
)
def test_a_file_beside_the_video_that_cannot_be_its_caption_is_its_problem_alone(tmp_path, files, words):
    captions, problems = beside(tmp_path, clip_mp4="", good_mp4="", good_txt="a dog", **files)
    assert captions == {"good.mp4": "a dog"}
    assert list(problems) == ["clip.mp4", *(["clip.mkv"] if "clip_mkv" in files else [])]
    assert re.search(words, problems["clip.mp4"])
    assert "\n" not in problems["clip.mp4"]


def test_a_caption_that_cannot_be_read_is_a_problem_unless_none_could_be(tmp_path, monkeypatch):
    def read_bytes(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    (tmp_path / "clip.txt").touch()
    number = errno.EACCES
    file = str(tmp_path / "clip.mp4")
    assert sidecar_captions({"clip.mp4": file}) == ({}, {"clip.mp4": f"{tmp_path}/clip.txt: Permission denied"})
    number = errno.EMFILE
    with pytest.raises(OSError, match="Too many open files"):
        sidecar_captions({"clip.mp4": file})
