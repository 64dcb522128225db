"""Which device a command runs on, and that trainer and sampler keep to theirs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import fails

from k5kernels.device import choose_device


@pytest.fixture
def gpus(monkeypatch):
    """Make PyTorch report so many GPUs."""

    def report(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return report


@pytest.mark.parametrize(("count", "kind"), [(0, "cpu"), (1, "cuda"), (8, "cuda")])
def test_the_gpu_is_taken_where_there_is_one(gpus, count, kind):
    gpus(count)
    assert choose_device() == torch.device(kind)
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_is_chosen_by_its_number(gpus):
    gpus(2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"cuda:2 is not here: PyTorch .* sees 2 GPUs"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(gpus, name):
    gpus(0)
    with pytest.raises(ValueError, match=f"{name} is not here"):
        choose_device(name)


@pytest.mark.parametrize("name", ["gpu", "", "meta", "cuda:x", "tpu"])
def test_another_kind_of_device_is_refused(name):
    with pytest.raises(ValueError, match='expected "cpu", "cuda" or "cuda:N"'):
        choose_device(name)


def test_encode_refuses_a_device_before_it_reads_anything(gpus):
    gpus(0)
    fails("encode nothing.mp4 --vae nothing.safetensors --out nowhere --device cuda", 2, "cuda is not here")


def test_training_and_sampling_on_a_device_of_their_own():
    """In a process of its own: the toy device stays once it is there, and other tests ask for the accelerator."""
    cases = Path(__file__).parent / "on_toy_device" / "cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " skipped" not in ran.stdout
