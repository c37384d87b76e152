"""The trainer's store, and threads for the members of a transfer."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from online_dpo.rollout.weights.store import StoreServer
from support.weight_transfers import SECRET, SIZE


@pytest.fixture
def server():
    server = StoreServer([socket.create_server(("127.0.0.1", 0))], SECRET)
    yield server
    server.close()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(SIZE) as pool:
        yield pool
