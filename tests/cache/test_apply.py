"""A cache on other people's models: what it skips, what it gives, and that nothing of it stays."""

import pytest
import torch
from small_crossdit import inputs, random_model, relative_difference
from torch import nn

from k5kernels.cache import MagCache, apply
from model.sampler import sample

STEPS = 10


class Block(nn.Module):
    """Adds to its two streams, and counts its calls."""

    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def forward(self, hidden, other, time):
        self.calls += 1
        return hidden + self.weight * time, other - self.weight * time


class Model(nn.Module):
    """Two lists of blocks over two streams, one of which may be missing in a single-stream model."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(1.0), Block(2.0)])
        self.single_transformer_blocks = nn.ModuleList([Block(4.0)])

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        other = encoder_hidden_states
        for block in self.transformer_blocks:
            hidden_states, other = block(hidden_states, other, timestep.view(-1, 1, 1))
        for block in self.single_transformer_blocks:
            hidden_states, other = block(hidden_states, other, time=timestep.view(-1, 1, 1))
        return hidden_states, other

    @property
    def calls(self):
        return [block.calls for block in (*self.transformer_blocks, *self.single_transformer_blocks)]


TEXT, NEGATIVE = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)


def policy(**settings):
    return MagCache({"cond": [1.0] * (STEPS - 1), "uncond": [1.0] * (STEPS - 1)}, retention=0.0, **settings)


@torch.no_grad()
def call(model, step, text=TEXT, tokens=5):
    x = torch.full((1, tokens, 4), float(step))
    return model(x, torch.tensor([1000.0 - 10 * step]), text)


def snapshot(model):
    modules = [vars(module) for module in model.modules()]
    return [type(module) for module in model.modules()], [
        {key: dict(value) if isinstance(value, dict) else value for key, value in module.items() if key != "calls"}
        for module in modules
    ]


def test_a_skipped_pass_adds_what_the_blocks_added_to_every_stream():
    model = Model()
    with apply(model, policy()) as report:
        first, skipped = call(model, 0), call(model, 1)
    assert model.calls == [1, 1, 1]
    assert torch.equal(skipped[0], first[0] + 1)
    assert torch.equal(skipped[1], first[1])
    assert [one.computed for one in report.passes] == [True, False]
    assert report.speedup == 2


def test_every_pass_that_is_computed_is_as_without_a_cache():
    model, plain = Model(), Model()
    with apply(model, policy(threshold=0.0)):
        for step in range(STEPS):
            for text in (TEXT, NEGATIVE):
                for ours, expected in zip(call(model, step, text), call(plain, step, text), strict=True):
                    assert torch.equal(ours, expected)


def test_branches_do_not_share_a_residual():
    model = Model()
    with apply(model, policy()):
        for text in (TEXT, NEGATIVE):
            call(model, 0, text)
        outs = [call(model, 1, text)[1] - text for text in (TEXT, NEGATIVE)]
    assert model.calls == [2, 2, 2]
    assert torch.equal(outs[0], outs[1])


def test_a_second_evaluation_at_one_time_is_computed():
    model = Model()
    with apply(model, policy()) as report:
        for step in (0, 1, 1, 2, 2):
            call(model, step)
    assert [one.computed for one in report.passes] == [True, False, True, False, True]
    assert "a second evaluation" in str(report)


def test_an_interrupted_run_does_not_leak_into_the_next():
    model, plain = Model(), Model()
    with apply(model, policy()):
        call(model, 0)
        model.single_transformer_blocks[0].weight.data.fill_(100.0)
        call(model, 0)
        model.single_transformer_blocks[0].weight.data.fill_(4.0)
        assert torch.equal(call(model, 1)[0], call(plain, 1)[0])


def test_an_exception_in_a_block_leaves_the_next_pass_as_it_should_be(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("full")

    model, plain = Model(), Model()
    with apply(model, policy()):
        monkeypatch.setattr(model.single_transformer_blocks[0], "forward", full)
        with pytest.raises(RuntimeError, match="full"):
            call(model, 0)
        monkeypatch.undo()
        assert [type(one) for one in model.transformer_blocks] == [Block, Block]
        assert torch.equal(call(model, 1)[0], call(plain, 1)[0])


def test_a_run_of_another_shape_is_a_run_of_its_own():
    model, plain = Model(), Model()
    with apply(model, policy()):
        call(model, 0)
        assert torch.equal(call(model, 1, tokens=7)[0], call(plain, 1, tokens=7)[0])


def test_under_gradients_everything_is_computed():
    model = Model()
    with apply(model, policy()) as report, torch.enable_grad():
        for step in range(3):
            model(torch.zeros(1, 5, 4), torch.tensor([1000.0 - step]), TEXT)[0].sum().backward()
    assert model.calls == [3, 3, 3]
    assert "gradients" in str(report)


def test_nothing_is_left_behind():
    model = Model()
    before = snapshot(model)
    cached = apply(model, policy())
    call(model, 0)
    call(model, 1)
    cached.remove()
    cached.remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("first", [0, 1])
def test_nested_caches_end_in_any_order(first):
    model = Model()
    before = snapshot(model)
    caches = [apply(model, policy()), apply(model, policy())]
    caches[first].remove()
    call(model, 0)
    call(model, 1)
    assert model.calls == [1, 1, 1]
    caches[1 - first].remove()
    assert snapshot(model) == before


def test_the_blocks_keep_their_names_and_their_list_its_kind():
    model = Model()
    names = list(model.state_dict())
    with apply(model, policy()):
        assert list(model.state_dict()) == names
        assert isinstance(model.transformer_blocks, nn.ModuleList)
        assert list(model.transformer_blocks) == [model.transformer_blocks[0], model.transformer_blocks[1]]


def test_blocks_that_are_compiled_stay_compiled():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, example_inputs):
        def run(*args):
            compiled.append(graph)
            return graph(*args)

        return run

    model = Model()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend=backend, fullgraph=True)
    with apply(model, policy()):
        for step in range(4):
            call(model, step)
    assert len(compiled) == 2 * 3


def test_our_model_is_cached_as_by_its_sampler():
    model = random_model()
    _, _, text = inputs(1, (2, 4, 4))
    _, _, negative = inputs(1, (2, 4, 4), seed=2)
    given = {"steps": STEPS, "guidance": 3.0, "shape": (1, 2, 4, 4, 16)}
    expected = sample(model, text, negative, cache=policy(), **given)
    with apply(model, policy()) as report:
        ours = sample(model, text, negative, **given)
    assert report.skipped > STEPS
    assert relative_difference(ours, expected) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ["layers"]}, "blocks: expected lists of blocks of Model named layers, found"),
        ({"time": "sigma"}, "time: expected one of self, hidden_states, timestep, encoder_hidden_states, got 'sigma'"),
        ({"text": "prompt"}, "text: expected one of"),
    ],
)
def test_what_a_model_does_not_have_is_refused(settings, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply(model, policy(), **settings)
    assert snapshot(model) == before
