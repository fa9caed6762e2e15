"""Interruptions at any moment: between any two instructions of some of our files."""

import contextlib
import signal
import sys
from pathlib import Path

import gpt_tf

PACKAGE = Path(gpt_tf.__file__).parent


class Interruption:
    """Raise an error at one moment of a block, or find out which moments it has.

    Args:
        *names: Files and folders of the package whose instructions count.
        error: What to raise, a class.
        moment: Where: an instruction, and how often it has run before; None: nowhere.

    Attributes:
        moments: Those that passed, in order.
        raised: Whether the moment came.
    """

    def __init__(self, *names, error=KeyboardInterrupt, moment=None):
        self.places = tuple(str(PACKAGE / name) for name in names)
        self.error, self.moment = error, moment
        self.moments, self.raised = [], False
        self._counts = {}

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *exception):
        sys.settrace(self._before)

    def _enter(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(self.places):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._instruction

    def _instruction(self, frame, event, argument):
        if event == "opcode" and not self.raised:
            place = frame.f_code, frame.f_lasti
            count = self._counts[place] = self._counts.get(place, -1) + 1
            self.moments.append((place, count))
            if self.moments[-1] == self.moment:
                self.raised = True
                raise self.error
        return self._instruction


def some_of(moments, count):
    """Return so many moments, evenly spread over the instructions that ran.

    Of each instruction the moment is another one: the first, the second, the last.
    """
    times = {}
    for place, number in moments:
        times[place] = number + 1
    places = list(times)
    chosen = [places[index * len(places) // count] for index in range(count)]
    numbers = [(0, 1, times[place] - 1)[i % 3] for i, place in enumerate(chosen)]
    return [
        (place, min(number, times[place] - 1))
        for place, number in zip(chosen, numbers, strict=True)
    ]


@contextlib.contextmanager
def no_longer_than(seconds):
    """Fail where the block hangs."""

    def fail(number, frame):
        raise AssertionError(f"it hangs after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
