"""The report's rows: every launch on every architecture; kept in table.json and table.md."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import triton

from bench.gpu_report.compile import ARCHS, KIB, Arch, Resources, compile_launch, violations
from bench.gpu_report.kernels import KERNELS
from bench.gpu_report.launches import Variant, variants
from bench.gpu_report.roofline import DENSITY, PEAKS, SIZES, bound_ms, intensity

TABLE = Path(__file__).parent / "table.json"
READABLE = TABLE.with_suffix(".md")
COLUMNS = (
    "kernel", "D", "arch", "registers", "spills", "shared KiB (limit)", "MMA", "TMA", "warps", "CTAs/SM",
    "occupancy", "serialized", "loop", "flop/byte", "bound ms",
)  # fmt: skip


@dataclass(frozen=True)
class Row(Resources):
    """`Resources` of a variant on an architecture; flops per byte and the roofline's bound at the size of its D."""

    kernel: str
    head_dim: int
    arch: str
    flop_per_byte: float
    bound_ms: float


def combinations() -> Iterator[tuple[Variant, Arch]]:
    """What the table has a row for, in its order."""
    for size in SIZES.values():
        launched = {arch: variants(size, arch.capability) for arch in ARCHS}
        every = {name: variant.launch.kernel for named in launched.values() for name, variant in named.items()}
        for name in sorted(every, key=lambda name: (list(KERNELS).index(every[name]), name)):
            yield from ((launched[arch][name], arch) for arch in ARCHS if name in launched[arch])


def compile_row(variant: Variant, arch: Arch) -> Row:
    """Compile, and put the bound beside it; figures rounded as the table shows them."""
    used = compile_launch(variant.launch, arch)
    return Row(
        **asdict(used) | {"occupancy": round(used.occupancy, 3)},
        kernel=variant.name,
        head_dim=variant.head_dim,
        arch=arch.name,
        flop_per_byte=_significant(intensity(variant.work)),
        bound_ms=_significant(bound_ms(variant.work, PEAKS[arch.name])),
    )


def broken_gates(rows: Iterable[Row]) -> list[str]:
    """Every violation of the gate; raises KeyError for a row without a variant."""
    known = {(variant.name, variant.head_dim, arch.name): (variant, arch) for variant, arch in combinations()}
    return [text for row in rows for text in violations(*known[row.kernel, row.head_dim, row.arch], row)]


def header() -> list[str]:
    """What the figures are, and of which GPUs the peaks."""
    sizes = "; ".join(
        f"D={dim}: {size.name}, S={size.tokens:,}, {size.blocks:,} blocks, {size.heads} heads"
        for dim, size in SIZES.items()
    )
    peaks = "; ".join(
        f"{arch}: {peak.gpu}, {peak.tensor / 1e12:g} Tflop/s bf16, {peak.vector / 1e12:g} Tflop/s float32, "
        f"{peak.memory / 1e12:g} TB/s"
        for arch, peak in PEAKS.items()
    )
    return [
        f"Compiled ahead of time by triton {triton.__version__}; no GPU was used and nothing was timed.",
        f"Bound: the least time of one launch on one sample at the peaks of the vendor's data sheet. {peaks}.",
        "CTAs/SM: resident on a multiprocessor. Of kernels with wgmma: warnings of ptxas (C7510 to C7514) that it "
        "serializes them, and what one step of the loop is made of.",
        "Without MMA: no tl.dot, or one of exact float32, which tensor cores do not have.",
        f"Sizes, at {DENSITY:.0%} density: {sizes}.",
    ]


def cells(row: Row) -> list[str]:
    """The row as text, one cell for each of COLUMNS."""
    limit = next(arch.shared_limit for arch in ARCHS if arch.name == row.arch)
    return [
        row.kernel,
        str(row.head_dim),
        row.arch,
        str(row.registers),
        str(row.spills),
        f"{row.shared / KIB:.1f} ({limit // KIB})",
        f"{row.mma_kind} {row.mma}" if row.mma else "",
        str(row.tma) if row.tma else "",
        str(row.warps),
        str(row.thread_blocks),
        f"{row.occupancy:.0%}",
        str(row.serialized) if row.mma_kind == "HGMMA" else "",
        row.loop,
        f"{row.flop_per_byte:g}",
        f"{row.bound_ms:g}",
    ]


def readable(rows: Iterable[Row]) -> str:
    """table.md"""
    lines = ["# GPU kernels, compiled ahead of time", "", *(line + "\n" for line in header())]
    lines += ["Written by `python -m bench.gpu_report --write`.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def read() -> list[Row]:
    """The committed rows."""
    names = [field.name for field in fields(Row)]
    return [Row(**dict(zip(names, values, strict=True))) for values in json.loads(TABLE.read_text())["rows"]]


def write(rows: list[Row]) -> None:
    """Replace the committed table."""
    names = [field.name for field in fields(Row)]
    lines = ",\n".join(json.dumps([getattr(row, name) for name in names]) for row in rows)
    TABLE.write_text(
        f'{{"triton": {json.dumps(triton.__version__)},\n"columns": {json.dumps(names)},\n"rows": [\n{lines}\n]}}\n'
    )
    READABLE.write_text(readable(rows))


def _significant(value: float) -> float:
    return float(f"{value:.3g}")
