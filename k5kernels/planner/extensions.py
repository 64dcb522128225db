"""Which terms join the report's formulas (§7.3) beside those that a layout itself brings."""

from dataclasses import dataclass

from k5kernels.planner.checks import one_of, switch

MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of one of the two moments of Adam
OPTIMIZER_DTYPES = tuple(MOMENT_BYTES)


@dataclass(frozen=True)
class Extensions:
    """All off: the report's formulas.

    communication: collectives of shards, replicas and sequence parallelism take time. text_encoder: it takes time and
    memory. ema: a running average of the weights is kept (§6.3.2). buffers: gradients inside a block, gathered weights
    and block inputs on their way to or from the host take memory. reserve: so does what the allocator and the driver
    keep. optimizer_dtype: of the optimizer's moments, one of OPTIMIZER_DTYPES.
    Raises ValueError that names the field where a value is of another kind.
    """

    communication: bool = False
    text_encoder: bool = False
    ema: bool = False
    buffers: bool = False
    reserve: bool = False
    optimizer_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("communication", "text_encoder", "ema", "buffers", "reserve"):
            switch(name, getattr(self, name))
        one_of("optimizer_dtype", self.optimizer_dtype, OPTIMIZER_DTYPES)


PLAIN = Extensions()
FULL = Extensions(communication=True, text_encoder=True, ema=True, buffers=True, reserve=True)
