"""Stages of a step have names in a profile: for NVTX where its package is there, for torch.profiler always."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from small_crossdit import inputs, random_model

from k5kernels import profiling
from k5kernels.attention import AttentionConfig
from k5kernels.profiling import stage
from model.latent_tokens import latent_velocity


@pytest.fixture
def nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a package nvtx would be told: "+ name" where a range begins, "- name" where it ends."""
    told: list[str] = []

    @contextmanager
    def annotate(name: str, domain: str):
        assert domain == "k5kernels"
        told.append(f"+ {name}")
        yield
        told.append(f"- {name}")

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    monkeypatch.setattr(profiling, "HAS_NVTX", True)
    return told


def test_the_package_takes_the_ranges():
    assert profiling.HAS_NVTX
    with stage("a stage"):
        pass


def test_ranges_nest(nvtx_ranges):
    with stage("outer"), stage("inner"):
        pass
    assert nvtx_ranges == ["+ outer", "+ inner", "- inner", "- outer"]


def test_the_stages_of_a_pass_are_named(nvtx_ranges):
    model = random_model()
    x, time, text = inputs(1, (2, 16, 16))
    latent_velocity(model, x, time, text, attention=AttentionConfig("nabla", thr=0.5))
    assert nvtx_ranges[:2] == ["+ text and time", "- text and time"]
    block = ["self-attention", "NABLA mask", "block-sparse attention", "cross-attention", "feed-forward"]
    begun = [told[2:] for told in nvtx_ranges[2:] if told.startswith("+")]
    assert begun == 2 * ["visual block", *block]


def test_without_the_package_torch_profiler_has_the_names(monkeypatch):
    monkeypatch.setattr(profiling, "HAS_NVTX", False)
    with torch.profiler.profile() as profile, stage("a stage"):
        torch.ones(3).sum()
    assert "a stage" in {event.key for event in profile.key_averages()}


def test_a_compiled_graph_has_no_ranges(nvtx_ranges):
    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        with stage("a stage"):
            return 2 * x

    assert double(torch.ones(1)) == 2
    assert nvtx_ranges == []
