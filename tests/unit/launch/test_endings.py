"""How processes ended, and whether the run is started again."""

import pytest

from online_dpo.launch.endings import how_it_ended, run_code


@pytest.mark.parametrize(
    "codes, server_lost, expected",
    [
        ({0: 0, 1: 0}, False, 0),
        ({0: 1, 1: -9}, False, None),  # rank 0 ends because rank 1 was killed
        ({0: 1, 1: 1}, False, 1),
        ({0: 1, 1: 1}, True, None),  # it may have ended because the server was away
        ({0: 2, 1: 2}, True, 2),
        ({0: 3, 1: 3}, False, 3),
        ({0: 143, 1: 143}, False, 143),
        ({1: 1, 0: 0}, False, 1),
    ],
)
def test_only_what_was_lost_is_started_again(codes, server_lost, expected):
    assert run_code(codes, server_lost=server_lost) == expected


def test_ends_in_words():
    assert how_it_ended(3) == "has ended with exit code 3"
    assert how_it_ended(-9) == "was killed by SIGKILL"
    assert how_it_ended(-63) == "was killed by signal 63"
