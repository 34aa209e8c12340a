"""The shield: what reaches the work, what does not, and how it ends."""

from __future__ import annotations

import random
import signal
import threading
import time
from contextvars import ContextVar

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn.modules.module import register_module_forward_hook

from gatecc.capture.neutral import neutral, neutral_weights
from gatecc.capture.shield import apart, callers_device, random_states_kept, shielded
from gatecc.capture.signature import split_inputs

VARIABLE: ContextVar[int] = ContextVar("variable", default=0)


def test_what_a_graph_bakes_in_is_handed_over() -> None:
    def ambient() -> tuple[bool, bool, torch.dtype, bool, int]:
        cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        return torch.is_grad_enabled(), *cast, VARIABLE.get()

    VARIABLE.set(3)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert apart(ambient) == (False, True, torch.float16, False, 3)
    assert apart(ambient) == (True, False, torch.get_autocast_dtype("cpu"), False, 3)


def test_the_default_device_is_there_for_the_models_own_code_alone() -> None:
    def work() -> tuple[str, str]:
        with callers_device():
            inside = torch.ones(1).device.type
        return inside, torch.ones(1).device.type

    with torch.device("meta"):
        assert apart(work) == ("meta", "cpu")
        assert apart(lambda: apart(work)) == ("meta", "cpu")
    assert apart(work) == ("cpu", "cpu")


def test_an_error_comes_out_as_it_is() -> None:
    error = KeyError("x")

    @shielded
    def fails(a: int, *, b: int) -> None:
        assert (a, b) == (1, 2)
        raise error

    with pytest.raises(KeyError) as raised:
        fails(1, b=2)
    assert raised.value is error


def test_an_interrupt_stops_the_work_after_it_has_cleaned_up() -> None:
    cleaned: list[bool] = []

    def work() -> None:
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as Ctrl-C does
            for _ in range(10_000):
                time.sleep(0.001)
        finally:
            cleaned.append(True)

    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            apart(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cleaned == [True]
    assert time.monotonic() - start < 8
    assert apart(lambda: 1) == 1


def test_one_capture_runs_at_a_time_and_may_hold_another() -> None:
    running: list[int] = []
    most: list[int] = []

    def work() -> None:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    threads = [threading.Thread(target=apart, args=(lambda: apart(work),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_hooks_on_all_modules_are_put_aside_and_come_back() -> None:
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    x = torch.ones(1, 2)
    apart(lambda: nn.Linear(2, 2)(x))
    assert seen == []
    nn.Linear(2, 2)(x)
    assert seen == ["Linear"]
    handle.remove()
    nn.Linear(2, 2)(x)
    assert seen == ["Linear"]


def test_random_states_are_put_back() -> None:
    before = torch.get_rng_state(), random.getstate()
    with random_states_kept():
        torch.rand(3)
        random.random()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_neutral_tensors() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert neutral(x) is x
    with torch.inference_mode():
        made = torch.ones(3)
    plain = neutral(made)
    assert not plain.is_inference()
    assert torch.equal(plain, made)
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(apart(lambda: neutral(x)))
        return x

    vmap(look)(x)
    assert torch.equal(seen[0], x[0])
    assert seen[0].requires_grad
    assert seen[0].is_leaf
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert torch.autograd.forward_ad.unpack_dual(neutral(dual)).tangent is None
    with torch.inference_mode():
        args, kwargs = split_inputs((made, [made, None, 3]))
    assert args[0] is not made
    assert (args[1][1:], kwargs) == ([None, 3], {})
    example = (x, [x])
    assert split_inputs(example)[0] is example


def test_neutral_weights_are_parameters_and_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    swapped = torch.ones(2, 2)
    for layer in module:
        layer._parameters["weight"] = swapped  # pyright: ignore[reportArgumentType] - as functional_call does
    with neutral_weights(module):
        first, second = (layer._parameters["weight"] for layer in module)
        assert first is second
        assert isinstance(first, nn.Parameter)
        assert torch.equal(first, swapped)
    assert all(layer._parameters["weight"] is swapped for layer in module)
