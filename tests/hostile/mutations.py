"""Damage done to files, the same for the same seed: what disks, networks, tools and people do to them."""

import io
import json
import math
import random
import struct
import tarfile
from collections.abc import Iterator
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**30), 0.5, -0.0, math.inf, -math.inf, math.nan, 1e308,
    5e-324, "", "nan", "0", "1/0", "\x00", "é" * 50, "\udc80", "../../x", "a" * 70_000, [], [[]], [0] * 1000, {},
    {"": {}},
)  # fmt: skip


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to four kinds of damage; the result differs from `data` unless that is empty."""
    damaged = data
    for _ in range(draw.choice((1, 1, 2, 4))):
        damaged = draw.choice(DAMAGES)(damaged, draw)
    return damaged if damaged != data else data[:-1]


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Other values, keys and structure of a JSON text; now and then other bytes, or brackets without end."""
    kind = draw.random()
    if kind < 0.02:
        return draw.choice((b"[", b'{"a":')) * 100_000
    if kind < 0.3:
        return mutate_bytes(data, draw)
    value = json.loads(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = _mutate_value(value, draw)
    return json.dumps(value).encode()


def nudge_json(data: bytes, draw: random.Random) -> bytes:
    """A JSON text in which one number, text or truth has become another that is as likely."""
    value = json.loads(data)
    leaves = list(_leaves(value))
    holder, key = draw.choice(leaves)
    match holder[key]:
        case bool() as truth:
            holder[key] = not truth
        case int() as number:
            holder[key] = number + draw.choice((-1, 1, 512))
        case str() as text if text:
            place = draw.randrange(len(text))
            holder[key] = text[:place] + draw.choice("0123456789abcdef") + text[place + 1 :]
        case _:
            holder[key] = None if holder[key] is not None else "is broken"
    return json.dumps(value).encode()


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(list or object, index or key) of all that is neither."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, dict | list):
            yield from _leaves(item)
        else:
            yield value, key


def mutate_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Another header, or length of it, or other bytes of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = draw.random()
    if kind < 0.5:
        changed = mutate_json(header, draw)
        return struct.pack("<Q", len(changed)) + changed + body
    if kind < 0.6:
        return struct.pack("<Q", draw.choice((0, 1, length - 1, length + 1, 2**40, 2**64 - 1))) + header + body
    return mutate_bytes(data, draw)


def mutate_tar_members(data: bytes, draw: random.Random) -> bytes:
    """A tar that is whole, of members that were changed, renamed, dropped, repeated, turned into links or reordered."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = [(info, file.read()) for info in tar if (file := tar.extractfile(info)) is not None]
    number = draw.randrange(len(members))
    info, content = members[number]
    match draw.randrange(12):
        case 0:
            del members[number]
        case 1:
            members.insert(draw.randrange(len(members) + 1), members[number])
        case 2:
            draw.shuffle(members)
        case 3:
            info.name = draw.choice(
                ("", "../x.json", "a.b.json", "é.json", "x" * 300, info.name.upper(), "/" + info.name)
            )
        case 4:
            info.type = draw.choice((tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"Z"))
        case _:
            mutate = mutate_json if info.name.endswith(".json") else mutate_safetensors
            members[number] = (info, mutate(content, draw))
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def mutate_boxes(data: bytes, draw: random.Random) -> bytes:
    """Boxes of an MP4 or MOV swapped, repeated, dropped, resized or renamed; anything else as by `mutate_bytes`."""
    levels = [boxes for boxes in _boxes(data, 0, len(data)) if boxes]
    if not levels:
        return mutate_bytes(data, draw)
    boxes = draw.choice(levels)
    (start, end), other = draw.choice(boxes), draw.choice(boxes)
    match draw.randrange(5):
        case 0:
            first, second = sorted([(start, end), other])
            if first == second:
                return data[:start] + data[end:]
            between = data[first[1] : second[0]]
            return data[: first[0]] + data[slice(*second)] + between + data[slice(*first)] + data[second[1] :]
        case 1:
            return data[:end] + data[start:]
        case 2:
            return data[:start] + data[end:]
        case 3:
            size = draw.choice((0, 1, 7, 8, 2**32 - 1, draw.randrange(2 * len(data))))
            return data[:start] + struct.pack(">I", size) + data[start + 4 :]
        case _:
            return data[: start + 4] + draw.choice((b"free", b"moov", b"mdat", bytes(4))) + data[start + 8 :]


def _boxes(data: bytes, start: int, end: int) -> list[list[tuple[int, int]]]:
    """(start, end) of the boxes of each level of an MP4 or MOV, those side by side together; [] for anything else."""
    level: list[tuple[int, int]] = []
    below: list[list[tuple[int, int]]] = []
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        if size < 8 or start + size > end or not kind.isalnum():
            return []
        level.append((start, start + size))
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta"):
            below += _boxes(data, start + 8, start + size)
        start += size
    return [level, *below]


def _flip_bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20)) if data else 0):
        changed[_position(len(changed), draw)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, draw: random.Random) -> bytes:
    """Anywhere, or where a block of a tar or of a disk ends."""
    block = draw.choice((1, 512))
    return data[: draw.randrange(len(data) + 1) // block * block]


def _drop(data: bytes, draw: random.Random) -> bytes:
    start = _position(len(data), draw)
    return data[:start] + data[start + draw.choice((1, 4, 512, 5000)) :]


def _repeat(data: bytes, draw: random.Random) -> bytes:
    start = _position(len(data), draw)
    return data[: start + draw.choice((1, 4, 512, 5000))] + data[start:]


def _swap(data: bytes, draw: random.Random) -> bytes:
    a, b, c, d = sorted(draw.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _overwrite(data: bytes, draw: random.Random) -> bytes:
    start, length = _position(len(data), draw), draw.choice((1, 4, 8, 64, 512, 4096))
    filling = draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length)))
    return (data[:start] + filling + data[start + length :])[: len(data)]


def _append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((bytes(512), draw.randbytes(100), data[:1000]))


DAMAGES = (_flip_bits, _flip_bits, _truncate, _drop, _repeat, _swap, _overwrite, _append)


def _position(length: int, draw: random.Random) -> int:
    """Half of the time near the start, where formats keep what decides how the rest is read."""
    if length == 0:
        return 0
    return draw.randrange(min(length, 512)) if draw.random() < 0.5 else draw.randrange(length)


def _mutate_value(value: Any, draw: random.Random) -> Any:
    """Change something in a JSON value, more often deep in it than at its top."""
    kind = draw.random()
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        if kind < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.3:
            other = key + draw.choice(("_", "x", "\0"))
            return {other if name == key else name: item for name, item in value.items()}
        return value | {key: _mutate_value(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        index = draw.randrange(len(value))
        if kind < 0.2:
            return value[:index] + value[index + 1 :]
        if kind < 0.4:
            return [*value[:index], value[index], *value[index:]]
        return [*value[:index], _mutate_value(value[index], draw), *value[index + 1 :]]
    return draw.choice(ODD_VALUES)
