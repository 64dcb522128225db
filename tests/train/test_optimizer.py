"""What weight decay reaches, and that a step on shards is the step of one process."""

import torch
from sharded_checks import stepped
from tiny_stage import TINY

from bench.gloo_processes import on_processes
from model.crossdit import CrossDiT
from train.optimizer import adamw, parameter_groups


def test_norms_biases_and_embeddings_do_not_decay():
    model = CrossDiT(TINY)
    decayed, left = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed | left == set(names)
    for one in left:
        assert names[one].endswith("bias") or "norm" in names[one] or "embeddings" in names[one], names[one]
    for one in decayed:
        assert names[one].endswith("weight")
        assert "norm" not in names[one]
        assert "embeddings" not in names[one]


def test_decay_shrinks_matrices_alone():
    model = CrossDiT(TINY)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, 0.1, 0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = name.endswith("bias") or "norm" in name or "embeddings" in name
        torch.testing.assert_close(parameter.detach(), before[name] * (1 if kept else 0.95), msg=name)


def test_the_groups_are_the_same_at_every_weight_decay():
    model = CrossDiT(TINY)
    without, with_decay = (
        [[id(p) for p in group["params"]] for group in parameter_groups(model, decay)] for decay in (0.0, 0.1)
    )
    assert without == with_decay


def test_a_step_on_shards_is_that_of_one_process_and_plans_no_operation_on_dtensors():
    assert on_processes(2, stepped) == [True, []]
