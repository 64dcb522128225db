"""The pipelines of diffusers that the drop-in takes, each with a tiny model of random weights and a call of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

STEPS = 6
TEXT, POOLED, LENGTH = 16, 12, 5  # widths; words


@dataclass(frozen=True)
class Case:
    """needs: the class of diffusers without which it is left out. make: the pipeline. given: further arguments of a
    call of it, with six steps and guidance. names: of the transformers."""

    needs: str
    make: Callable[[], Any]
    given: Callable[[], dict[str, Any]]


def random(model: Any) -> Any:
    """With random weights: as they are made, gates let nothing through."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


@torch.no_grad()
def generate(pipe: Any, case: Case) -> Tensor:
    """[..]: latents, or the frames of super-resolution."""
    result = pipe(
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), return_dict=False, **case.given()
    )
    return result[0]


def _made(name: str, **parts: Any) -> Any:
    kind = getattr(diffusers, name)
    others = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = kind(**{key: part for key, part in others.items() if key in _parameters(kind)} | parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parameters(kind: Any) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters)


def _seeded(make: Callable[[], Any]) -> Any:
    """As it is made, but the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _image() -> Image.Image:
    pixels = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0))
    return Image.fromarray((pixels * 255).byte().numpy())


# Kandinsky 5


def _kandinsky5(name: str, vae: Any = None, visual_cond: bool = False, sizes: tuple[Any, ...] = ()) -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=TEXT, in_text_dim2=POOLED, time_dim=24, model_dim=64,
        ff_dim=96, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), visual_cond=visual_cond,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = _made(name, transformer=random(transformer), scheduler=scheduler, vae=vae)
    pipe.encode_prompt = None  # never asked for: the embeddings are given
    if sizes:
        pipe.resolutions = list(sizes)
    return pipe


def _kandinsky5_given(**others: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": ["one"], "guidance_scale": 3.0, "output_type": "latent"}
    for seed, prefix in enumerate(("", "negative_")):
        given |= {
            f"{prefix}prompt_embeds_qwen": _random(1, LENGTH, TEXT, seed=seed),
            f"{prefix}prompt_embeds_clip": _random(1, POOLED, seed=seed),
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, LENGTH]),
        }
    return given | others


def _video_vae() -> Any:
    sizes = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    return _seeded(lambda: diffusers.AutoencoderKLHunyuanVideo(**sizes))


def _image_vae() -> Any:
    sizes = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 16}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return _seeded(lambda: diffusers.AutoencoderKL(**sizes, **kinds))


# Kandinsky 6


def _kandinsky6() -> Any:
    transformer = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=TEXT, in_text_dim2=POOLED, time_dim=24, model_dim=64,
        ff_dim=96, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), visual_cond=True,
        visual_token_type_num_embeddings=2,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _made("Kandinsky6TI2VAPipeline", transformer=random(transformer), scheduler=scheduler, vae=_video_vae())


def _kandinsky6_given(**others: Any) -> dict[str, Any]:
    size = {"height": 48, "width": 80, "num_frames": 5}
    given = size | {"guidance_scale": 3.0, "sample_audio": False, "output_type": "latent"}
    for seed, prefix in enumerate(("", "negative_")):
        given[f"{prefix}prompt_embeds"] = _random(1, LENGTH, TEXT, seed=seed)
        given[f"{prefix}pooled_prompt_embeds"] = _random(1, POOLED, seed=seed)
    return given | others


def _super_resolution() -> Any:
    transformer = diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=8, out_visual_dim=8, time_dim=24, model_dim=64, ff_dim=96, num_visual_blocks=2,
        axes_dims=(8, 12, 12), nabla_threshold=1.0, nabla_window=(3, 3, 3), tile_sizes=((128, 128),),
    )  # fmt: skip
    widths = {"encoder_block_out_channels": (4, 4, 8, 8, 8), "decoder_block_out_channels": (4, 4, 8, 8, 8)}
    vae = _seeded(lambda: diffusers.Kandinsky6SRVAE(latent_channels=8, layers_per_block=1, **widths))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _made("Kandinsky6SRPipeline", transformer=random(transformer), scheduler=scheduler, vae=vae)


# Wan


def _wan_transformer(in_channels: int = 16) -> Any:
    return random(
        diffusers.WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=in_channels, out_channels=16, text_dim=TEXT,
            freq_dim=32, ffn_dim=64, num_layers=2,
        )
    )  # fmt: skip


def _wan(name: str = "WanPipeline", two: bool = False, in_channels: int = 16, vae: Any = None) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts: dict[str, Any] = {"transformer": _wan_transformer(in_channels), "scheduler": scheduler, "vae": vae}
    if two:
        parts |= {"transformer_2": _wan_transformer(in_channels), "boundary_ratio": 0.7}
    if "image_encoder" in _parameters(getattr(diffusers, name)):
        parts |= {"image_encoder": None, "image_processor": None}
    return _made(name, **parts)


def _wan_given(**others: Any) -> dict[str, Any]:
    size = {"height": 48, "width": 80, "num_frames": 5}
    texts = {"prompt_embeds": _random(1, LENGTH, TEXT), "negative_prompt_embeds": _random(1, LENGTH, TEXT, seed=1)}
    return size | texts | {"guidance_scale": 3.0, "output_type": "latent"} | others


def _wan_vae() -> Any:
    return _seeded(lambda: diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1))


# HunyuanVideo


def _hunyuan() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=TEXT, pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _made("HunyuanVideoPipeline", transformer=random(transformer), scheduler=scheduler)


def _hunyuan_given() -> dict[str, Any]:
    given: dict[str, Any] = {"height": 48, "width": 80, "num_frames": 5, "true_cfg_scale": 3.0}
    for seed, prefix in enumerate(("", "negative_")):
        given |= {
            f"{prefix}prompt_embeds": _random(1, LENGTH, TEXT, seed=seed),
            f"{prefix}pooled_prompt_embeds": _random(1, POOLED, seed=seed),
            f"{prefix}prompt_attention_mask": torch.ones(1, LENGTH),
        }
    return given | {"output_type": "latent"}


VIDEO, IMAGE = {"height": 48, "width": 80, "num_frames": 5}, {"height": 64, "width": 96}
CASES = {
    "Kandinsky 5 T2V": Case(
        "Kandinsky5T2VPipeline",
        lambda: _kandinsky5("Kandinsky5T2VPipeline", visual_cond=True),
        lambda: _kandinsky5_given(**VIDEO),
    ),
    "Kandinsky 5 I2V": Case(
        "Kandinsky5I2VPipeline",
        lambda: _kandinsky5("Kandinsky5I2VPipeline", _video_vae(), visual_cond=True),
        lambda: _kandinsky5_given(image=_image(), **VIDEO | {"num_frames": 25}),  # it evens out the first four latents
    ),
    "Kandinsky 5 T2I": Case(
        "Kandinsky5T2IPipeline",
        lambda: _kandinsky5("Kandinsky5T2IPipeline", sizes=((96, 64),)),
        lambda: _kandinsky5_given(**IMAGE),
    ),
    "Kandinsky 5 I2I": Case(
        "Kandinsky5I2IPipeline",
        lambda: _kandinsky5("Kandinsky5I2IPipeline", _image_vae(), visual_cond=True, sizes=((96, 64),)),
        lambda: _kandinsky5_given(image=_image(), **IMAGE),
    ),
    "Kandinsky 6": Case("Kandinsky6TI2VAPipeline", _kandinsky6, _kandinsky6_given),
    "Kandinsky 6 with an image": Case(
        "Kandinsky6TI2VAPipeline", _kandinsky6, lambda: _kandinsky6_given(image=_image().resize((80, 48)))
    ),
    "Kandinsky 6 SR": Case(
        "Kandinsky6SRPipeline",
        _super_resolution,
        lambda: {"video": _random(1, 5, 3, 64, 96).sigmoid(), "resolution_scale": 2, "output_type": "pt"},
    ),
    "Wan 2.1": Case("WanPipeline", _wan, _wan_given),
    "Wan 2.1 I2V": Case(
        "WanImageToVideoPipeline",
        lambda: _wan("WanImageToVideoPipeline", in_channels=36, vae=_wan_vae()),
        lambda: _wan_given(image=_image()),
    ),
    "Wan 2.2": Case("WanPipeline", lambda: _wan(two=True), _wan_given),
    "HunyuanVideo": Case("HunyuanVideoPipeline", _hunyuan, _hunyuan_given),
}
