"""What errors say when they say nothing."""

import http.client
import re
import socket
import struct
import threading
from contextlib import suppress

import pytest

from online_dpo.errors import error_text, named_error
from online_dpo.scoring.judges.llm.judge import LLMJudge
from support import tiny


def raised_from(error, cause):
    try:
        raise error from cause
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "text", "named"),
    [
        (ConnectionError("away"), "away", "ConnectionError: away"),
        (ConnectionError(), "ConnectionError", "ConnectionError"),
        (ValueError(" two\n lines "), "two lines", "ValueError: two lines"),
        (raised_from(OSError(), TimeoutError("timed out")),) + ("OSError (because of TimeoutError: timed out)",) * 2,
        (raised_from(OSError(), TimeoutError()),) + ("OSError (because of TimeoutError)",) * 2,
        (http.client.RemoteDisconnected(), "RemoteDisconnected", "RemoteDisconnected"),
    ],
)
def test_every_error_says_something(error, text, named):
    assert (error_text(error), named_error(error)) == (text, named)


def test_only_the_first_line_of_an_error_that_goes_on_with_a_stack():
    assert named_error(RuntimeError("no memory\n#0 c10::Error"), first_line=True) == "RuntimeError: no memory"


def test_a_connection_that_is_cut_off_has_a_cause():
    """The error of the client's library says nothing then."""

    def cut_off(server):
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(100)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=cut_off, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        judge = LLMJudge(model="m", base_url=url, attempts=1)
        comparison = tiny.group(tiny.prompts([3])[0], [[5, 6], [7, 8]])
        assert judge.prefer([comparison]) == [None]
        server.shutdown(socket.SHUT_RDWR)
    found = re.search(r"no connection to http://127\.0\.0\.1:\d+/v1: (.+)", judge.last_failure)
    assert found and found[1].startswith("ReadError"), judge.last_failure
