import os

import pytest

from gpt_tf.native_logs import quiet


def test_remarks_are_held_back_and_errors_follow(capfd):
    with quiet():
        os.write(2, b"INFO: [environment.cc:36] Creating LiteRT environment\n")
        os.write(2, b"WARNING: [npu_registry.cc:34] not found\n")
        os.write(2, "\u2514 and why\n".encode())
        os.write(2, b"ERROR: out of memory\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "ERROR: out of memory\n"
    os.write(2, b"INFO: of somebody else\n")
    assert capfd.readouterr().err == "INFO: of somebody else\n"


def test_standard_error_is_given_back_after_an_exception(capfd):
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    os.write(2, b"INFO: heard\n")
    assert capfd.readouterr().err == "INFO: heard\n"


def test_it_works_without_a_standard_error():
    kept = os.dup(2)
    os.close(2)
    try:
        with quiet():
            pass
    finally:
        os.dup2(kept, 2)
        os.close(kept)
