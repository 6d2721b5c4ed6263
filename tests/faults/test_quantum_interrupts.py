"""Interrupts, exceptions and threads around Aer's memory: the process stays healthy."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import quantum
from quantum.state import AerRows

FLIP = np.array([[0, 1], [1, 0]], dtype=np.complex128)
LOOP = """
import signal, sys, torch, quantum
def stop(number, frame):
    raise InterruptedError
signal.signal(signal.SIGTERM, stop)
layer = quantum.QuantumLayer(6, 2)
inputs = torch.randn(64, 6, requires_grad=True)
(before,) = torch.autograd.grad(layer(inputs).sum(), inputs)
print("ready", flush=True)
interrupted = 0
while interrupted < 10:
    try:
        while True:
            layer(inputs).sum().backward()
    except (KeyboardInterrupt, InterruptedError):
        interrupted += 1
        print("caught", flush=True)
(after,) = torch.autograd.grad(layer(inputs).sum(), inputs)
sys.exit(7 if torch.equal(before, after) else 1)
"""


def test_signals_in_the_middle_leave_a_healthy_process():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True, env=environment) as process:
        watchdog = threading.Timer(120, process.kill)  # a lost signal would leave it running for ever
        watchdog.start()
        assert process.stdout.readline() == "ready\n"
        for k in range(10):
            time.sleep(0.0137 * (1 + k % 5))
            process.send_signal(signal.SIGINT if k % 2 else signal.SIGTERM)
            assert process.stdout.readline() == "caught\n"
        assert process.wait() == 7
        watchdog.cancel()


def prepared(n_rows, n_wires):
    rows = np.zeros((n_rows, 2**n_wires), dtype=np.complex128)
    rows[:, 0] = 1.0
    return rows


def test_an_interrupt_inside_is_delivered_after_the_state_is_closed():
    rows = prepared(2, 2)

    def interrupted():
        with AerRows(rows) as aer:
            os.kill(os.getpid(), signal.SIGINT)
            aer.unitary((1,), FLIP)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert np.array_equal(rows[:, 1], np.ones(2))  # the gate behind the signal was applied
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_inside_gives_the_memory_back():
    rows = prepared(4, 4)

    def failing():
        with AerRows(rows) as aer:
            aer.gate("cx", (0, 1))
            raise ZeroDivisionError

    for _ in range(20):
        with pytest.raises(ZeroDivisionError):
            failing()
    with AerRows(rows) as aer:
        aer.unitary((3,), FLIP)
    assert np.array_equal(rows[:, 1], np.ones(4))


@pytest.mark.parametrize(
    "rows",
    [np.zeros((2, 4), dtype=np.float32), np.zeros((3, 4), dtype=complex), np.zeros((4, 8), dtype=complex)[:, ::2]],
)
def test_an_array_that_aer_would_copy_or_misread_never_reaches_it(rows):
    with pytest.raises(AssertionError):
        AerRows(rows)


def test_threads_share_a_layer_and_agree_with_one_thread():
    layer = quantum.QuantumLayer(4, 2, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(16, 4, dtype=torch.float64)

    def gradient():
        leaf = inputs.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
        return grad

    expected, results, errors = gradient(), [], []

    def work():
        try:
            results.extend(gradient() for _ in range(20))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 80
    assert all(torch.equal(result, expected) for result in results)
    assert layer.executed.rows_forward == 81 * 16
    assert layer.executed.circuits == 81 * 16 * (1 + 2 * (4 + 24))
