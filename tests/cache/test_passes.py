"""Step and branch are told from the calls themselves, whatever the sampler does."""

import torch

from k5kernels.cache.passes import Passes

COND, UNCOND = (torch.full((1, 3, 4), value) for value in (1.0, 2.0))


def tell(calls, passes=None, kind=None):
    passes = passes or Passes()
    return [passes.tell(time, [text.clone()], kind) for time, text in calls]


def told(calls, passes=None):
    return [(one.branch, one.step, one.certain) for one in tell(calls, passes)]


def guided(*times):
    return [(time, text) for time in times for text in (COND, UNCOND)]


def test_guided_passes_are_two_branches_of_one_step():
    assert told(guided(1000, 900, 800)) == [
        (branch, step, True) for step in range(3) for branch in ("cond", "uncond")
    ]  # fmt: skip


def test_a_model_distilled_from_guidance_has_one_branch():
    assert told([(1000, COND), (900, COND), (500, COND)]) == [("cond", step, True) for step in range(3)]


def test_guidance_can_come_and_go():
    calls = [(1000, COND), *guided(900, 800), (700, COND), *guided(600)]
    steps = [
        ("cond", 0),
        ("cond", 1),
        ("uncond", 1),
        ("cond", 2),
        ("uncond", 2),
        ("cond", 3),
        ("cond", 4),
        ("uncond", 4),
    ]
    assert told(calls) == [(*step, True) for step in steps]


def test_the_branches_of_a_step_may_come_in_any_order():
    assert told([*guided(1000), (900, UNCOND), (900, COND)])[2:] == [("uncond", 1, True), ("cond", 1, True)]


def test_a_second_evaluation_at_one_time_is_not_certain_and_no_step():
    calls = [(1000, COND), (900, COND), (900, COND), (800, COND), (800, COND)]  # Heun
    assert told(calls) == [
        ("cond", 0, True),
        ("cond", 1, True),
        ("cond", 1, False),
        ("cond", 2, True),
        ("cond", 2, False),
    ]


def test_a_time_that_rises_begins_a_run():
    passes = Passes()
    tell(guided(1000, 900), passes)
    assert [one.begins for one in tell(guided(1000, 900), passes)] == [True, False, False, False]


def test_a_run_after_one_that_was_interrupted_in_its_first_step_begins_anew():
    passes = Passes()
    tell([(1000, COND)], passes)
    (first,) = tell([(1000, COND)], passes)
    assert first.begins
    assert not first.certain
    assert told([(1000, UNCOND), (900, COND)], passes) == [("uncond", 0, True), ("cond", 1, True)]


def test_another_shape_or_list_of_times_begins_a_run():
    passes = Passes()
    tell([(1000, COND), (900, COND)], passes, kind="small")
    (first,) = tell([(800, COND)], passes, kind="large")
    assert first.begins


def test_a_name_that_the_caller_gives_is_believed():
    passes = Passes()
    names = [passes.tell(time, [COND], None, name).branch for time in (1000, 900) for name in ("uncond", "cond")]
    assert names == ["uncond", "cond"] * 2


def test_without_a_text_every_pass_is_of_one_branch():
    passes = Passes()
    assert [passes.tell(time, []).step for time in (1000, 900, 800)] == [0, 1, 2]
