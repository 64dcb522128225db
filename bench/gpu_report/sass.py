"""What the loop of a kernel of matrix products (wgmma) is made of, read from nvdisasm's text."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

PRODUCT = r"\bHGMMA\b"
EXP2 = r"\bMUFU\.EX2\b"
BARRIER = r"\bBAR\.SYNC\b"
WAIT = r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)"  # until at most so many groups of products are under way


@dataclass(frozen=True)
class Loop:
    """Instructions of one step: all, products, exp2, those of exp2 that run while a product is under way, barriers
    among warps."""

    instructions: int
    products: int
    exp2: int
    overlapped: int
    barriers: int

    def __str__(self) -> str:
        return (
            f"{self.instructions}: {self.products} HGMMA, {self.exp2} EX2 ({self.overlapped} under HGMMA), "
            f"{self.barriers} BAR"
        )


def product_loop(sass: str) -> Loop | None:
    """The longest innermost loop with products; None where there is none."""
    found = [_read(body) for body in _innermost(sass)]
    return max(found, key=lambda loop: loop.instructions, default=None)


def _innermost(sass: str) -> Iterator[list[str]]:
    """The bodies of loops with products that contain no other of these. Waits that spin have none."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    spans = []
    for end, text in enumerate(code):
        jump = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
        start = labels.get(jump[1], end + 1) if jump else end + 1
        if start <= end and any(re.search(PRODUCT, x) for x in code[start : end + 1]):
            spans.append((start, end))
    taken: list[tuple[int, int]] = []
    # A wait's spin may stand behind the kernel's end and jump back into the loop: the shorter span is the loop.
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(end < other_start or start > other_end for other_start, other_end in taken):
            taken.append((start, end))
            yield code[start : end + 1]


def _read(body: list[str]) -> Loop:
    under_way, overlapped = False, 0
    for text in body:
        if wait := re.search(WAIT, text):
            under_way = int(wait[1]) > 0
        elif re.search(EXP2, text):
            overlapped += under_way
    counts = (sum(bool(re.search(pattern, text)) for text in body) for pattern in (PRODUCT, EXP2, BARRIER))
    products, exp2, barriers = counts
    return Loop(len(body), products, exp2, overlapped, barriers)
