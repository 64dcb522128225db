"""How the kernels of block-sparse attention are configured on each generation of GPUs.

A configuration is chosen because it was measured. `MEASURED` has those, by the run they come from in bench/results/;
every other generation, head dimension and dtype gets `fallback`, which nobody measured. What the kernels compile to
ahead of time (`make gpu-report`) chooses nothing: the first run on a GPU showed that the numbers of warps that look
best there are the slowest.
"""

from dataclasses import dataclass

# Generations (major compute capability) that load tiles through tensor descriptors (TMA).
DESCRIPTOR_GENERATIONS = (9, 10, 12)
# Generations whose tensor cores read their operands from shared memory: wgmma and tcgen05.
WARPGROUP_GENERATIONS = (9, 10)
KERNELS = ("forward", "backward_queries", "backward_keys")


@dataclass(frozen=True)
class Configuration:
    """warps, stages: `num_warps` and `num_stages` of the launch. descriptors: whether the tiles that a kernel loads
    along its lists come through tensor descriptors, where the tensors allow it."""

    warps: int
    stages: int
    descriptors: bool


# H200, bf16 (bench/results/h200-2026-11-26.json): the backward alone at head dimension 128 ran at 390 TFLOP/s so,
# and at 175 with 8 warps and no descriptors.
MEASURED = {
    (9, head_dim, kernel): Configuration(warps=4, stages=2, descriptors=True)
    for head_dim in (64, 128)
    for kernel in KERNELS
}


def configuration(kernel: str, element_size: int, head_dim: int, generation: int, descriptors: bool) -> Configuration:
    """Of a kernel in KERNELS. element_size: bytes. generation: the major compute capability, 9 for sm_90.

    descriptors: whether the tensors and the layout allow them, as they did in what was measured.
    """
    measured = MEASURED.get((generation, head_dim, kernel)) if element_size == 2 and descriptors else None
    return measured or fallback(kernel, element_size, head_dim, generation, descriptors)


def fallback(kernel: str, element_size: int, head_dim: int, generation: int, descriptors: bool) -> Configuration:
    """For lack of anything nearer, what was measured on sm_90, except where that cannot be kept in registers.

    The operands of mma.sync (sm_80, sm_120) are in registers: there, 8 warps share a tile of more than 64 columns, and
    descriptors serve the forward only. On sm_90 dk and dv of such a tile take 8 warps without descriptors. float32
    does not use tensor cores: more warps share its products.
    """
    wide = head_dim > 64
    if element_size == 4:
        few = kernel == ("backward_keys" if wide else "forward")
        return Configuration(warps=4 if few else 8, stages=1, descriptors=False)
    descriptors = descriptors and generation in DESCRIPTOR_GENERATIONS and head_dim in (64, 128)
    if generation in WARPGROUP_GENERATIONS:
        many = generation == 9 and kernel == "backward_keys" and wide and not descriptors
    else:
        descriptors = descriptors and kernel == "forward"
        many = wide or kernel == "backward_keys"
    return Configuration(warps=8 if many else 4, stages=2, descriptors=descriptors)
