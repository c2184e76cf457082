"""Parts of the hooks on their own: what a block is given, what tells re-entrant checkpointing, what a thread's record keeps."""

import contextlib
import dataclasses
import functools
import threading
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from sta_adapter import ClipLayout, STAConfig
from sta_adapter.compatibility.calls import iterate_tensors, map_tensors
from sta_adapter.compatibility.checkpointing import checkpoints_reentrantly
from sta_adapter.injection.hooks import BlockPreHook, EncoderPostHook, NormPreHook, remove_hooks
from sta_adapter.injection.registry import get_backbone
from sta_adapter.injection.state import CALLS_KEPT, Injection
from sta_adapter.injection.told import take_clip_lengths

LAYOUT = ClipLayout([(2, 3)])


@pytest.fixture
def injection():
    return Injection(STAConfig(order="before_spatial"), get_backbone("qwen2_vl"))


@pytest.mark.parametrize("by_keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("residual", [None, torch.full((6, 4), 5.0)], ids=["alone", "with a residual"])
def test_the_branch_sees_the_stream_and_adds_to_the_tokens(injection, by_keyword, residual):
    seen = []
    block = SimpleNamespace(sta=lambda stream, layout: seen.append(stream.clone()) or torch.ones_like(stream))
    tokens = torch.arange(24.0).view(6, 4)
    injection.begin(LAYOUT)
    kwargs = {"other": 3, **({"hidden": tokens} if by_keyword else {})}
    kwargs |= {} if residual is None else {"residual": residual}
    args, found = BlockPreHook(injection)(block, () if by_keyword else (tokens, 7), kwargs)
    assert torch.equal(found["hidden"] if by_keyword else args[0], tokens + 1)
    assert args[1:] == (() if by_keyword else (7,))
    assert found["other"] == 3
    assert torch.equal(seen[0], tokens if residual is None else tokens + residual)
    assert torch.equal(tokens, torch.arange(24.0).view(6, 4))


@pytest.mark.parametrize("second", [torch.full((6, 4), 5.0), torch.full((4,), 5.0)], ids=["summand", "condition"])
def test_a_norms_second_argument_is_a_summand_if_it_is_shaped_as_one(injection, second):
    seen = []
    block = SimpleNamespace(sta=nn.Module())
    block.sta.forward = lambda stream, layout: seen.append(stream.clone()) or torch.ones_like(stream)
    tokens = torch.arange(24.0).view(6, 4)
    before = tokens.clone()
    injection.begin(LAYOUT)
    changed = NormPreHook(injection, block)(nn.LayerNorm(4), (tokens, second), {})
    is_summand = second.dim() == 2
    assert torch.equal(seen[0], before + second if is_summand else before)
    assert (changed is not None) is is_summand  # whose block goes on with the norm's sum; others with what the norm got
    args = changed[0] if is_summand else (tokens, second)
    assert torch.equal(args[0], before + 1)
    assert args[1] is second
    assert torch.equal(tokens, before if is_summand else before + 1)


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "grad_checkpointing", "with_cp", "use_checkpoint"])
def test_re_entrant_checkpointing_is_told_by_its_flag_and_function(flag):
    encoder = nn.Sequential(nn.Linear(2, 2))
    assert not checkpoints_reentrantly(encoder)
    setattr(encoder[0], flag, True)
    assert checkpoints_reentrantly(encoder)
    for reentrant in (True, False):
        encoder[0]._gradient_checkpointing_func = functools.partial(print, use_reentrant=reentrant)
        assert checkpoints_reentrantly(encoder) is reentrant


class Taking(nn.Module):
    def forward(self, x, clip_lengths=None):
        return x


def test_clip_lengths_are_taken_from_the_keywords_of_those_that_do_not_have_them():
    given = {"clip_lengths": [2, 1], "x": 3}
    assert take_clip_lengths(nn.Identity(), given) == ({"x": 3}, (2, 1))
    assert take_clip_lengths(Taking(), given) == (given, (2, 1))
    assert take_clip_lengths(nn.Identity(), {"x": 3}) == ({"x": 3}, None)


@dataclasses.dataclass
class Output:
    tokens: torch.Tensor
    more: object = None


class Pair(NamedTuple):
    tokens: torch.Tensor
    other: int


def test_tensors_in_containers_are_found_and_replaced_where_they_lie():
    one, two, three, four = (torch.tensor(float(number)) for number in range(1, 5))
    nested = (one, [two, "words", {"a": three, "b": None}], 7)
    found = iterate_tensors((*nested, Output(four, more=SimpleNamespace(deep=one)), OrderedDict(last=two)))
    assert [tensor.item() for tensor in found] == [1, 2, 3, 4, 1, 2]
    assert list(iterate_tensors("words")) == []
    twice = map_tensors(lambda tensor: tensor * 2, nested)
    assert twice == (2.0, [4.0, "words", {"a": 6.0, "b": None}], 7)
    assert map_tensors(lambda tensor: tensor * 2, Pair(two, 7)) == Pair(4.0, 7)
    own = OrderedDict(a=one)  # what is no plain dict stays as it is
    assert map_tensors(lambda tensor: tensor * 2, own) is own


def test_removed_hooks_leave_no_options_behind(injection):
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(BlockPreHook(injection), with_kwargs=True)
    module.register_forward_hook(EncoderPostHook(injection), always_call=True)
    remove_hooks(module, injection)
    for name in ("pre_hooks", "pre_hooks_with_kwargs", "hooks", "hooks_always_called"):
        assert not getattr(module, f"_forward_{name}")


def test_an_output_is_noted_within_a_forward_only(injection):
    injection.set_output("before")
    assert injection.thread.forward is None
    injection.begin(LAYOUT)
    injection.set_output("within")
    assert injection.thread.forward.output == "within"
    injection.end()
    assert injection.thread.forward is None


def test_forwards_with_gradients_are_counted_until_asked_for(injection):
    assert injection.pop_ran() is False
    with torch.no_grad():
        injection.begin(LAYOUT)
    assert injection.pop_ran() is False
    injection.begin(LAYOUT)
    with torch.no_grad():
        injection.begin(None)
    assert injection.pop_ran() is True
    assert injection.pop_ran() is False


def test_the_latest_kinds_of_calls_are_kept(injection):
    injection.record_calls(range(CALLS_KEPT))
    assert list(injection.calls) == list(range(CALLS_KEPT))
    injection.record_calls([CALLS_KEPT, CALLS_KEPT + 1])
    assert list(injection.calls) == list(range(2, CALLS_KEPT + 2))


def test_threads_that_see_many_kinds_of_calls(injection):
    """Explaining must never break a forward: adding and dropping in one thread while another does the same."""
    failures = []

    def see(first):
        try:
            for number in range(first, first + 20_000):
                injection.record_calls([number])
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=see, args=(1_000_000 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(injection.calls) <= CALLS_KEPT + len(threads)


def test_the_clips_told_last_count_and_those_before_come_back(injection):
    assert injection.clip_lengths is None
    with contextlib.suppress(ZeroDivisionError), injection.clips((4,)):
        assert injection.clip_lengths == (4,)
        injection.told.by_call.lengths = (2, 2)
        assert injection.clip_lengths == (2, 2)
        with injection.clips((3,)):
            assert injection.clip_lengths == (3,)
        assert injection.clip_lengths == (2, 2)
        injection.told.by_call.lengths = None
        assert injection.clip_lengths == (4,)
        raise ZeroDivisionError
    assert injection.clip_lengths is None
