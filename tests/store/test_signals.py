"""Blocks that Ctrl-C does not interrupt."""

import signal
import threading

import pytest

from flashmoe_mlx.store.signals import defer_signals


@pytest.fixture(autouse=True)
def python_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_ctrl_c_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), defer_signals() as interrupted:
        assert not interrupted
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupted
        done.append(1)
    assert done


def test_errors_come_out_and_ctrl_c_works_again():
    with pytest.raises(ValueError, match="mine"), defer_signals():
        raise ValueError("mine")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_handler_of_others_is_called():
    calls = []
    signal.signal(signal.SIGINT, lambda *args: calls.append(args[0]))
    with defer_signals(), defer_signals():
        signal.raise_signal(signal.SIGINT)
        assert not calls
    assert calls == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_are_never_interrupted():
    found = []

    def work() -> None:
        with defer_signals() as interrupted:
            found.append((interrupted, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [([], signal.default_int_handler)]


def test_handlers_of_other_signals_wait_too_and_all_are_called():
    """A handler of SIGTERM often raises SystemExit; Ctrl-C comes last."""
    calls, done = [], []

    def leave(number, frame):
        calls.append(number)
        raise SystemExit(3)

    before = [(n, signal.signal(n, leave)) for n in (signal.SIGTERM, signal.SIGALRM)]
    try:
        with pytest.raises(KeyboardInterrupt) as caught, defer_signals() as interrupted:
            for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            assert len(interrupted) == 3
            done.append(1)
        assert done and sorted(calls) == [signal.SIGALRM, signal.SIGTERM]
        assert isinstance(caught.value.__context__, SystemExit)
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_signals_that_end_the_process_still_do():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with defer_signals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
