"""Average the weights of several trainings into one model (§6.4).

    python -m train.soup runs/people runs/nature --out soup.safetensors                            equal weights, 1/N
    python -m train.soup runs/people runs/nature --out soup.safetensors --sizes 400,100            √n of the data sets
    python -m train.soup runs/people runs/nature --out soup.safetensors --weights 2,1
    python -m train.soup runs/people runs/nature --out soup.safetensors --greedy --latents held_out

An ingredient is a run's folder, a weights file or a folder in diffusers' layout. Of a run's folder the averaged weights
are taken (EMA), of one that has not ended those in its newest checkpoint; with --raw that checkpoint's weights. Greedy
goes through the ingredients from the best to the worst and keeps one where the equal average with it has a lower
validation loss.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from k5_command import stop_in_one_line
from k5kernels.attention import DENSE
from k5kernels.device import choose_device
from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import DeviceName, one_line_errors
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.weight_files import write_weights
from model.crossdit import CrossDiT
from model.weights import config_to_json
from train.evaluation import probe_loss
from train.latents import LatentSet, read_shards
from train.stored_model import StoredModel, open_model

PROGRAM = "train.soup"
State = dict[str, Tensor]


def check_alike(ingredients: Sequence[StoredModel]) -> None:
    """Raises ValueError where two have other names, shapes or dtypes, or are configured in another way."""
    first = ingredients[0]
    for other in ingredients[1:]:
        where = f"{other.path}: expected the model of {first.path}"
        if odd := sorted(first.tensors.keys() ^ other.tensors.keys()):
            has = "lacks" if odd[0] in first.tensors else "also has"
            raise ValueError(f"{where}, {has} {odd[0]}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}")
        for name, tensor in first.tensors.items():
            got = other.tensors[name]
            if tensor.shape != got.shape:
                raise ValueError(f"{where}: {name} as {list(tensor.shape)}, got {list(got.shape)}")
            if tensor.dtype != got.dtype:
                raise ValueError(f"{where}: {name} in {tensor.dtype}, got {got.dtype}; convert one of them")
        if other.config != first.config:
            raise ValueError(f"{where}, got one of another config")


def shares(weights: Sequence[float], count: int) -> list[float]:
    """The weights, which sum to 1. Raises ValueError where there are not `count`, or one is negative or not finite."""
    if len(weights) != count:
        raise ValueError(f"weights: expected {count}, one for each ingredient, got {len(weights)}")
    if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights: expected numbers from 0, not all 0, got {', '.join(f'{w:g}' for w in weights)}")
    return [weight / sum(weights) for weight in weights]


def average(ingredients: Sequence[StoredModel], weights: Sequence[float]) -> State:
    """Σ wᵢ · ingredientᵢ, summed in float64, in the dtypes of the ingredients; one of them in memory at a time."""
    total: State = {}
    for ingredient, weight in zip(ingredients, weights, strict=True):
        if weight:
            for name, tensor in ingredient.read():
                part = tensor.double() * weight
                total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.to(ingredients[0].tensors[name].dtype) for name, tensor in total.items()}


def greedy(ingredients: Sequence[StoredModel], loss: Callable[[State], float]) -> tuple[list[float], float]:
    """(weights of the soup that greedy choice makes, its loss). The soup is never worse than the best ingredient."""
    count = len(ingredients)

    def of(members: Sequence[int]) -> float:
        return loss(average(ingredients, _equal(members, count)))

    alone = [of([index]) for index in range(count)]
    best, *others = sorted(range(count), key=alone.__getitem__)
    members, least = [best], alone[best]
    for index in others:
        if (with_it := of([*members, index])) < least:
            members, least = [*members, index], with_it
    return _equal(members, count), least


def _equal(members: Sequence[int], count: int) -> list[float]:
    return [1 / len(members) if index in members else 0.0 for index in range(count)]


def validation(config: CrossDiTConfig, latents: Path, device: torch.device) -> Callable[[State], float]:
    """The loss of weights on the latents in a folder, on fixed samples, noises and times."""
    data = LatentSet(read_shards(latents), {})
    disable_progress_bar()  # of the text encoder's weights
    encode_text = MiniLMTextEncoder(device).encode
    model = CrossDiT(config).to(device).eval()

    def loss(state: State) -> float:
        model.load_state_dict(state)
        return probe_loss(model, data, encode_text, DENSE)

    return loss


def _numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers with commas between them, got {text!r}") from None


@one_line_errors(PROGRAM)
def main(
    paths: Annotated[list[Path], typer.Argument(help="run folders or weights to average, two or more")],
    out: Annotated[Path, typer.Option(help="safetensors file for the average")],
    weights: Annotated[str | None, typer.Option(help="one for each, with commas; equal ones without")] = None,
    sizes: Annotated[str | None, typer.Option(help="of the data sets, with commas: weights are their roots")] = None,
    greedily: Annotated[bool, typer.Option("--greedy", help="keep what lowers the loss on --latents")] = False,
    latents: Annotated[Path | None, typer.Option(help="shards of --greedy, not trained on")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="a run's weights, not their running average")] = False,
    device: DeviceName = None,
) -> None:
    """Average weights."""
    if len(paths) < 2:
        raise ValueError(f"expected two ingredients or more, got {len(paths)}")
    if sum((weights is not None, sizes is not None, greedily)) > 1 or greedily != (latents is not None):
        raise ValueError("give one of --weights, --sizes and --greedy, and --latents with --greedy alone")
    given, numbers = _numbers(weights, "--weights"), _numbers(sizes, "--sizes")
    if numbers is not None:
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError(f"--sizes: expected numbers from 0, got {sizes}")
        given = [number**0.5 for number in numbers]
    chosen = None if greedily else shares(given if given is not None else [1.0] * len(paths), len(paths))
    ingredients = [open_model(path, raw) for path in paths]
    check_alike(ingredients)
    if chosen is None and latents is not None:
        chosen, least = greedy(ingredients, validation(ingredients[0].config, latents, choose_device(device)))
        typer.echo(f"validation loss {least:.5f}")
    assert chosen is not None
    write_weights(out, average(ingredients, chosen), config_to_json(ingredients[0].config), None)
    for path, share in zip(paths, chosen, strict=True):
        typer.echo(f"{share:.4f} × {path}")


if __name__ == "__main__":
    stop_in_one_line(PROGRAM)
    typer.run(main)
