"""The product's own handler, in processes of its own: a signal that goes wrong would end the tests."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from nkat_ray.errors import INTERRUPTED
from nkat_ray.signals import SIGNALS, Interrupted, Interruption


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Whoever starts the tests in the background (`nohup`, a shell's `&`) ignores some signals."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(code: str) -> subprocess.CompletedProcess[str]:
    lines = "import os, signal, sys\nfrom nkat_ray.signals import Interrupted, Interruption\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_outside_a_deferred_block_the_first_signal_raises_where_the_program_is(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert interruption.requested
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_inside_one_it_only_sets_a_flag_that_is_asked_where_it_is_safe(number: signal.Signals) -> None:
    with Interruption() as interruption, interruption.deferred():
        interruption.check()
        signal.raise_signal(number)
        with pytest.raises(Interrupted):
            interruption.check()


def test_a_second_one_ends_the_process_at_once_whatever_it_is_doing() -> None:
    done = run("""
        with Interruption() as interruption, interruption.deferred():
            signal.raise_signal(signal.SIGINT)
            print("goes on", flush=True)
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                print("never")
    """)
    assert done.returncode == INTERRUPTED
    assert done.stdout == "goes on\n"
    assert "--resume" in done.stderr


def test_a_handler_that_a_library_set_meanwhile_is_taken_over_and_the_first_one_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        signal.signal(signal.SIGTERM, lambda *_: None)
        interruption.install()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


# Reported in open-mmlab/mmsegmentation#1998
def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    done = run("""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            print(interruption.requested)
    """)
    assert (done.stdout, done.returncode) == ("False\n", 0)


def test_in_an_interactive_session_a_second_one_raises_and_the_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)  # a Python prompt and a notebook's kernel have it
    with Interruption() as interruption, interruption.deferred():
        signal.raise_signal(signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    before = signal.getsignal(signal.SIGINT)

    def work() -> bool:
        with Interruption() as interruption:
            return signal.getsignal(signal.SIGINT) == before and not interruption.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result()
