"""Shield: captures and proofs run where none of the caller's ambient state reaches them, and leave none of theirs.

A first call of a kind must look like every later one to whoever watches: hooks on saved tensors (gradient
checkpointing), dispatch and function modes (FLOP counters), functorch levels, inference mode, the cache of autocast,
hooks on the creation of autograd nodes and the profiler belong to a thread in torch. A fresh thread has none of them,
those of later versions of torch included. What a graph bakes in is handed over: grad mode, autocast, the default device
(to the model's own code alone), the accelerator's device and stream, Python's context variables. Hooks on all modules
are global; they are put aside. Random states are put back.

The caller waits, so nothing runs at the same time. Ctrl-C is passed on to the thread, which cleans up first. One
capture runs at a time: another thread that needs one waits for it.
"""

from __future__ import annotations

import ctypes
import functools
import random
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

P = ParamSpec("P")
T = TypeVar("T")

_LOCK = threading.RLock()
_SIGNALS = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # those that Python code may handle
_LOOK = 0.2  # seconds between two looks at what another thread may have raised here (see budget.py)
_STACK_BYTES = 64 << 20  # some systems give threads too little for torch.export
_INSIDE: ContextVar[bool] = ContextVar("gatecc_inside_shield", default=False)  # the lock is held for this thread
_DEVICE: ContextVar[torch.device | None] = ContextVar("gatecc_default_device", default=None)
_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks"),
    *("_global_module_registration_hooks", "_global_parameter_registration_hooks", "_global_buffer_registration_hooks"),
)


def shielded(function: Callable[P, T]) -> Callable[P, T]:
    """A function that runs behind the shield; for what the user calls. Raises what the function raises."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        return apart(lambda: function(*args, **kwargs))

    return called


def apart(work: Callable[[], T]) -> T:
    """``work()`` in a fresh thread, with what a graph bakes in handed over. Raises what the work raises."""
    ambient = _Ambient.now()
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with ambient.handed_over():
                done.append(work())
        except BaseException as e:
            failed.append(e)

    with ExitStack() as stack:
        if not _INSIDE.get():
            stack.enter_context(_LOCK)
            stack.callback(_INSIDE.reset, _INSIDE.set(True))
        _run_in_thread(functools.partial(copy_context().run, run))
    try:
        if failed:
            raise failed[0]
        return done[0]
    finally:
        failed.clear()  # the exception's frames hold this list


def _run_in_thread(run: Callable[[], None]) -> None:
    """Run and wait; what a signal raises meanwhile (Ctrl-C), or another thread (see budget.py), stops the thread, and
    goes on once it has cleaned up.

    The wait is for an event: a join that an exception interrupts takes the thread for ended (Python 3.11).
    """
    ended = threading.Event()

    def running() -> None:
        try:
            run()
        finally:
            ended.set()

    thread = threading.Thread(target=running, name="gatecc", daemon=True)
    interrupt: BaseException | None = None
    before = threading.stack_size(_STACK_BYTES)
    try:
        with _signals_later():  # else the thread might be left behind
            thread.start()
    except BaseException as e:
        if thread.ident is None:
            raise
        interrupt = e
        _stop(thread)
    finally:
        threading.stack_size(before)
    while True:
        try:
            while thread.is_alive() and not ended.wait(_LOOK):
                pass
            break
        except BaseException as e:
            interrupt = e
            _stop(thread)
    thread.join()
    if interrupt is not None:
        raise interrupt


def _stop(thread: threading.Thread) -> None:
    error = ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), error)


@contextmanager
def _signals_later() -> Generator[None]:
    """Signals wait until this ends; a thread that is started meanwhile takes none at all."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {getattr(signal, name) for name in _SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _Ambient:
    """What is handed over: graphs bake it in."""

    gradients: bool
    autocasts: tuple[tuple[str, torch.dtype], ...]  # device types that are under autocast
    device: torch.device | None  # the default one
    stream: torch.Stream | None  # of the accelerator, with its device

    @classmethod
    def now(cls) -> _Ambient:
        modes = [m for m in _get_current_function_mode_stack() if isinstance(m, DeviceContext)]
        accelerator = _accelerator()
        kinds = ("cpu", *((accelerator,) if accelerator else ()))
        return cls(
            torch.is_grad_enabled(),
            tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)),
            modes[-1].device if modes else _DEVICE.get(),
            torch.accelerator.current_stream() if accelerator else None,
        )

    @contextmanager
    def handed_over(self) -> Generator[None]:
        """Enter what is handed over, in the thread, whose state ends with it."""
        torch.set_grad_enabled(self.gradients)
        if self.stream is not None:
            torch.accelerator.set_stream(self.stream)
        # Casts that a proof makes carry no gradient, and weights have other values meanwhile. Regions of the model may
        # switch the cache on for themselves: it must be empty when they end, as it is at the end of outermost ones.
        torch.set_autocast_cache_enabled(False)
        for kind, dtype in self.autocasts:
            torch.set_autocast_enabled(kind, True)
            torch.set_autocast_dtype(kind, dtype)
        _DEVICE.set(self.device)
        with _no_global_hooks():
            yield


def _accelerator() -> str | None:
    """The accelerator's kind, if it is in use."""
    found = torch.accelerator.current_accelerator()
    if found is None:
        return None
    initialized = getattr(torch.get_device_module(found), "is_initialized", None)
    return found.type if initialized is None or initialized() else None


@contextmanager
def callers_device() -> Generator[None]:
    """The caller's default device: for the model's own code, which makes tensors on it; not for gatecc's."""
    device = _DEVICE.get()
    with ExitStack() as stack:
        if device is not None:
            stack.enter_context(torch.device(device))
        yield


@contextmanager
def _no_global_hooks() -> Generator[None]:
    """Hooks on all modules put aside. Others' threads miss them meanwhile, so nothing is touched if there are none."""
    tables = torch_modules.__dict__
    kept = {name: tables[name] for name in _GLOBAL_HOOKS if tables[name]}
    tables.update({name: type(hooks)() for name, hooks in kept.items()})
    try:
        yield
    finally:
        tables.update(kept)


@contextmanager
def random_states_kept() -> Generator[None]:
    """torch's random states on every device in use, Python's and NumPy's, as they were."""
    accelerator = _accelerator()
    devices = range(torch.accelerator.device_count()) if accelerator else ()
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=accelerator or "cuda"):
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
