"""Regular expressions of strangers, which may take for ever on purpose.

They are compiled and run in a process of their own, which is killed when one of them
takes too long: Python's `re` cannot be interrupted otherwise.
"""

import ast
import re
import subprocess
import sys
import threading

from gpt_tf.errors import InputError
from gpt_tf.settings import arguments

SECONDS = 2.0

_CODE = """
import ast, re, sys
print("ready", flush=True)
for line in sys.stdin:
    try:
        pattern, text, flags = ast.literal_eval(line)
        answer = re.search(pattern, text, flags) is not None
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        answer = str(error) or type(error).__name__
    print(ascii(answer), flush=True)
"""


class Patterns:
    """Looks for regular expressions in texts, each within `SECONDS`.

    Example:
        >>> with Patterns() as patterns:
        ...     patterns.find(r"= (4|four)\\b", "2 + 2 = 4.")
        True
    """

    def __init__(self):
        self._process = None

    def find(self, pattern: str, text: str, ignore_case: bool = False) -> bool | None:
        """Tell whether it is anywhere in a text; None where it took too long.

        Raises:
            InputError: It is no regular expression.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._process.stdout.readline()  # its start does not count
        # In ASCII: a lone surrogate goes through too.
        work = ascii((pattern, text, int(ignore_case and re.IGNORECASE)))
        self._process.stdin.write(work.encode() + b"\n")
        self._process.stdin.flush()
        is_late = threading.Event()
        timer = threading.Timer(SECONDS, self._end_late, [is_late])
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        timer.join()
        if is_late.is_set() or not line:
            self.close()
            return None
        answer = ast.literal_eval(line.decode())
        if isinstance(answer, str):
            raise InputError(
                "`regex` expects a regular expression as Python writes it. Received: "
                f"{arguments.shown(pattern)}; {answer}. Mend it."
            )
        return answer

    def _end_late(self, is_late):
        is_late.set()
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> "Patterns":
        return self

    def __exit__(self, *exception):
        self.close()
