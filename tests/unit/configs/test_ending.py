"""A signal ends a command, also where a library swallows what the signal raises."""

import signal
import subprocess
import sys

import pytest

BEGIN = """
import signal, sys, time
from configs.ending import came_through, ended_by_signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests in the background ignores it
command = ended_by_signals()
command.__enter__()
def wait(seconds=60):
    try:
        print("ready", flush=True)
        time.sleep(seconds)
    finally:
        print("woken", flush=True)
"""
BARE = """
try:
    wait()
except:
    pass
time.sleep(60)
"""
FINALISER = """
class Held:
    def __del__(self):
        wait()
held = Held()
del held
time.sleep(60)
"""
CALLBACK = """
import weakref
class Held: pass
held = Held()
reference = weakref.ref(held, lambda _: wait())
del held
time.sleep(60)
"""
CLEANING = """
try:
    wait()
finally:
    time.sleep(3)
    try:
        raise ValueError
    except ValueError as error:
        time.sleep(1.5)
        print("cleaned", flush=True)
"""
TAKEN = """
try:
    wait()
except BaseException:
    came_through()
time.sleep(3)
print("went on", flush=True)
"""


def ended(script, number):
    command = [sys.executable, "-c", BEGIN + script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        process.send_signal(number)
        output, errors = process.communicate(timeout=50)
    return process.returncode, output.split(), errors


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", [BARE, FINALISER, CALLBACK])
def test_what_a_library_swallows_is_raised_again(script, number, status):
    """Before: a Ctrl-C while Ray's imports caught everything was lost, and training went on for ever."""
    returned, output, errors = ended(script, number)
    assert (returned, output) == (status, ["woken"])
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the last one, which nobody catches here


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_command_that_is_ending_is_left_to_end(number, status):
    returned, output, errors = ended(CLEANING, number)
    assert (returned, output) == (status, ["woken", "cleaned"])
    assert errors.count("Traceback") == (number == signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_has_come_through_is_not_raised_again(number):
    assert ended(TAKEN, number) == (0, ["woken", "went", "on"], "")
