"""Sizes of the models that train and sample here, by name: the released ones (Table 3) and the nano model."""

from k5kernels.presets import MODEL_SIZES, CrossDiTConfig

PRESETS: dict[str, CrossDiTConfig] = {
    **MODEL_SIZES,
    # Trained here on CPU for the demo: the architecture at a width where approximations can still be judged.
    "nano": CrossDiTConfig(
        model_dim=192,
        time_dim=48,
        ff_dim=448,
        text_blocks=1,
        visual_blocks=8,
        axes_dims=(16, 24, 24),
        in_text_dim=384,
        in_text_dim2=384,
    ),
}
