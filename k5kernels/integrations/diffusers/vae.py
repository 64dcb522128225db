"""Our encoder and decoder in the place of those of diffusers' HunyuanVideo VAE, on its own weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from k5kernels.integrations.diffusers.overlays import Overlay
from k5kernels.integrations.diffusers.report import Report
from k5kernels.vae import HunyuanDecoder, HunyuanEncoder
from k5kernels.vae.config import SPATIAL_STRIDE, whole_latent_frames
from k5kernels.vae.plan import Mode, Plan
from k5kernels.vae.weights import DTYPES, empty_half_of_diffusers, weights_of_diffusers

TAKEN = "AutoencoderKLHunyuanVideo"
IMAGES = "it is a VAE of images, which has no frames to go through one after the other"
OTHER_VAES = {
    "AutoencoderKL": IMAGES,
    "AutoencoderKLFlux2": IMAGES,
    "AutoencoderKLQwenImage": IMAGES,
    "AutoencoderKLWan": "its layers are others, and it goes through a clip chunk by chunk itself",
    "AutoencoderKLKVAEVideo": "its layers are others",
    "AutoencoderKLHunyuanVideo15": "its layers are others, and it is 16 times smaller in space",
}


class VAEModes:
    """A mode at work in the `encode` and `decode` of one VAE, until `remove`."""

    def __init__(self, vae: Any, mode: Mode, memory_budget: int | None, report: Report) -> None:
        _check(vae)
        if mode not in get_args(Mode):
            raise ValueError(f"vae: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        settings = (mode, memory_budget, report)
        self._overlays: list[Overlay] = [_Encode(vae, "encode", settings), _Decode(vae, "decode", settings)]

    def remove(self) -> None:
        """The VAE as it was."""
        while self._overlays:
            self._overlays.pop().remove()


def is_vae(model: Any) -> bool:
    """Whether it is one of diffusers' VAEs, and not a transformer."""
    return type(model).__name__.startswith("Autoencoder")


def _check(vae: Any) -> None:
    name = type(vae).__name__
    if name != TAKEN:
        reason = OTHER_VAES.get(name, "its layers are not known here")
        raise ValueError(f"vae: expected diffusers' {TAKEN}, got {name}: {reason}")
    if any(getattr(module, "_diffusers_hook", None) is not None for module in vae.modules()):
        raise ValueError(
            "vae: it has hooks of diffusers (group offload, layerwise casting) around its layers, which are not called "
            "here; leave them out, or move the whole VAE with enable_model_cpu_offload()"
        )
    empty_half_of_diffusers(vae, HunyuanDecoder)  # refuses a VAE of this name with other settings


class _Half(Overlay):
    """One half, built without weights; at each call it is given the VAE's, wherever they are by then."""

    kind: type[Any]  # HunyuanEncoder or HunyuanDecoder

    def __init__(self, vae: Any, name: str, settings: tuple[Mode, int | None, Report]) -> None:
        self.mode, self.memory_budget, self.report = settings
        self.half: Any = empty_half_of_diffusers(vae, self.kind)
        super().__init__(vae, name)

    def why_not(self, x: Tensor) -> str | None:
        """Why the VAE's own method takes this call; None where ours does."""
        if torch.is_grad_enabled() and (x.requires_grad or self.owner.training):
            return "gradients may be asked for"
        return None

    @contextmanager
    def weights(self, x: Tensor) -> Iterator[None]:
        """Inside, the VAE's weights are ours too, and where it is offloaded it is moved first, as diffusers does before
        these methods. Afterwards we hold none of them, so that it can be moved or freed."""
        hook: Any = getattr(self.owner, "_hf_hook", None)
        if hasattr(hook, "pre_forward"):
            hook.pre_forward(self.owner)
        weights = weights_of_diffusers(self.owner, self.kind)
        first = next(iter(weights.values()))
        if first.device != x.device or first.dtype != x.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"vae: expected an input where its weights are, {first.dtype} on {first.device}, got {x.dtype} on "
                f"{x.device}; with sequential offload the layers move one by one, which is not supported here"
            )
        self.half.load_state_dict(weights, assign=True)
        try:
            yield
        finally:
            self.half.to("meta")

    def done(self, plan: Plan) -> None:
        """Notes what was done."""
        self.report.vae[str(plan).splitlines()[0]] += 1

    def unchanged(self, reason: str) -> None:
        """Notes a call that is left as it was."""
        self.report.vae[f"{self.name} as before: {reason}"] += 1


class _Encode(_Half):
    kind = HunyuanEncoder

    def why_not(self, x: Tensor) -> str | None:
        """What the library fills up or refuses is left to the VAE, whose result the pipeline knows."""
        if x.ndim != 5 or not whole_latent_frames(x.shape[2]):
            return "the frames are not 1 + a multiple of 4"
        if any(side % SPATIAL_STRIDE for side in x.shape[3:]):
            return f"the sides are no multiples of {SPATIAL_STRIDE}"
        return super().why_not(x)

    def instead(self, x: Tensor, return_dict: bool = True) -> Any:
        """diffusers' AutoencoderKLOutput, or a tuple, of the posterior."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        if (reason := self.why_not(x)) is not None:
            self.unchanged(reason)
            return self.former(x, return_dict)
        with self.weights(x):
            self.done(self.half.plan(x.shape, self.mode, self.memory_budget))
            found = self.half.encode(x, self.mode, self.memory_budget)
        posterior = DiagonalGaussianDistribution(torch.cat([found.mean, found.logvar], dim=1))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)


class _Decode(_Half):
    kind = HunyuanDecoder

    def instead(self, z: Tensor, return_dict: bool = True) -> Any:
        """diffusers' DecoderOutput, or a tuple, of the video."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        if (reason := self.why_not(z)) is not None:
            self.unchanged(reason)
            return self.former(z, return_dict)
        with self.weights(z):
            self.done(self.half.plan(z.shape, self.mode, self.memory_budget))
            sample = self.half.decode(z, self.mode, self.memory_budget)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
