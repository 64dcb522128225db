"""The least time of a launch, if the GPU reached its data sheet's peaks: a bound, not a measurement."""

from dataclasses import dataclass

from k5kernels import TokenLayout

DENSITY = 0.1


@dataclass(frozen=True)
class Peak:
    """Of one GPU, from its vendor's data sheet. tensor: dense bf16 with float32 sums, flop/s; vector: float32, flop/s;
    memory: byte/s."""

    gpu: str
    tensor: float
    vector: float
    memory: float


PEAKS = {
    "sm_80": Peak("A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12),
    "sm_90a": Peak("H100 SXM 80 GB", 989e12, 67e12, 3.35e12),
    "sm_100a": Peak("B200 (HGX)", 2250e12, 75e12, 8.0e12),
    "sm_120a": Peak("RTX 5090", 209.5e12, 104.8e12, 1.792e12),
}


@dataclass(frozen=True)
class Size:
    """The tokens of one clip and of its heads. ragged: a clip of about that size in which some blocks are smaller."""

    name: str
    layout: TokenLayout
    ragged: TokenLayout
    heads: int
    head_dim: int

    @property
    def tokens(self) -> int:
        return self.layout.tokens

    @property
    def blocks(self) -> int:
        return self.layout.blocks

    @property
    def kept(self) -> float:
        """Key blocks that a query block reads, on average."""
        return DENSITY * self.blocks


# The longest clips of the released models, one sample: Lite 10 s 512×768 and Pro 10 s 768×1280 (§5.4).
SIZES = {
    64: Size("Lite 10 s", TokenLayout(((61, 32, 48),)), TokenLayout(((61, 31, 48),)), 28, 64),
    128: Size("Pro 10 s HD", TokenLayout(((61, 48, 80),)), TokenLayout(((61, 47, 80),)), 32, 128),
}


@dataclass(frozen=True)
class Work:
    """What a launch does at least. bytes: to and from device memory, each once; tensor_core: where the flops run."""

    flops: float
    bytes: float
    tensor_core: bool = False


def intensity(work: Work) -> float:
    """Flops per byte."""
    return work.flops / work.bytes


def bound_ms(work: Work, peak: Peak) -> float:
    """The longer of computing and moving."""
    compute = work.flops / (peak.tensor if work.tensor_core else peak.vector)
    return 1e3 * max(compute, work.bytes / peak.memory)
