"""What errors say when they say nothing."""

import http.client

import pytest

from online_dpo.errors import error_text, named_error


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
