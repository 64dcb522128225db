"""What comes beside a frame's pixels: how it is to be turned, Dolby Vision, and so on."""

from fractions import Fraction
from typing import Any

import av.filter
from av.sidedata.sidedata import Type

# Kinds newer than PyAV's own list, which it cannot read past.
KNOWN = max(int(kind.value) for kind in Type)  # type: ignore[call-overload]  # not an enumeration in its stubs
UNKNOWN = range(KNOWN + 1, KNOWN + 17)


def side_data(frame: Any) -> dict[Type, bytes]:
    """The side data of a frame by its kind; kinds that PyAV does not know are left out."""
    try:
        return {data.type: bytes(data) for data in frame.side_data}
    except ValueError:
        return {data.type: bytes(data) for data in _without_unknown(frame).side_data}


def _without_unknown(frame: Any) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    deletions = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in UNKNOWN]
    graph.link_nodes(source, *deletions, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()
