"""A stage of a model at work, and the frames that pass through a row of stages.

A stage is a program that reads frames and writes one for each that it reads, so a
pipeline of processes is what a shell makes of it: the output of one is the input of
the next. The end of its input ends a stage, and that its output is gone does, so none
is left behind, whoever of them ends first.
"""

import contextlib
import os
import signal
import struct
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from gpt_tf.edge.container import read_stage
from gpt_tf.edge.executor import Executor

# Kinds of frames.
READY = 1  # comes out once all stages are open
RUN = 2
END = 3  # of a session
FAILED = 4  # the content says why

_HEADER = struct.Struct("<6iI")


class Frame(NamedTuple):
    """What is handed from stage to stage.

    Attributes:
        kind: One of the above.
        session: Number of the session.
        position: Positions in its cache before this.
        rows: Rows that its cache needs beyond them.
        length: Which prefill signature to run; 0: decode.
        count: Number of positions in the content.
        content: Token ids int32, `hidden` or logits float32, a message, or nothing.
    """

    kind: int
    session: int = 0
    position: int = 0
    rows: int = 0
    length: int = 0
    count: int = 0
    content: bytes = b""


class Stage:
    """One stage, with a cache for each session.

    Args:
        path: Its file.
        num_threads: Threads that compute.
    """

    def __init__(self, path: str | os.PathLike, num_threads: int):
        facts = read_stage(Path(path))
        self._executor = Executor(str(path), facts, num_threads, str(path))
        self._kind = np.float32 if facts["stage"]["index"] else np.int32
        self._sessions = {}

    def answer(self, frame: Frame) -> Frame:
        """Do what a frame asks for and return the one for the next stage."""
        if frame.kind == END:
            session = self._sessions.pop(frame.session, None)
            if session is not None:
                session.close()
        if frame.kind != RUN:
            return frame
        if frame.session not in self._sessions:
            self._sessions[frame.session] = self._executor.session()
        session = self._sessions[frame.session]
        session.position = frame.position
        session.reserve(frame.rows)
        values = np.frombuffer(frame.content, self._kind)
        if self._kind is np.float32:
            values = values.reshape(frame.count, -1)
        result = session.step(values, frame.length or None)
        return frame._replace(content=b"" if result is None else result.tobytes())

    def close(self) -> None:
        """Give the memory back."""
        self._sessions.clear()
        self._executor.close()


def send(stream: IO[bytes], frame: Frame) -> None:
    """Write a frame."""
    *numbers, content = frame
    stream.write(_HEADER.pack(*numbers, len(content)) + content)
    stream.flush()


def receive(stream: IO[bytes]) -> Frame | None:
    """Read a frame; None where the stream has ended."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    *numbers, size = _HEADER.unpack(header)
    content = stream.read(size)
    return Frame(*numbers, content) if len(content) == size else None


def work(path: str, num_threads: int) -> None:
    """Be a stage: read frames from standard input, write them to standard output."""
    # Who started the pipeline decides what an interruption ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Whatever else is written may not get between the frames.
    os.dup2(2, 1)
    with contextlib.suppress(BrokenPipeError):
        try:
            stage = Stage(path, num_threads)
            while frame := receive(source):
                send(sink, stage.answer(frame))
        except BrokenPipeError:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            send(sink, Frame(FAILED, content=message.encode("utf-8", "replace")))
    # Without a word from what is taken apart at an orderly end.
    os._exit(0)
