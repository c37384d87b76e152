"""Addresses and keys of services: what looks like a secret is refused, and never shown."""

from __future__ import annotations

import pytest

from online_dpo.config.endpoints import (
    check_address,
    check_no_secrets,
    check_variable,
    holds_secret,
    read_key,
    secret_fields,
    shown_address,
    shown_variable,
)
from online_dpo.config.trainer_config import OnlineDPOConfig

KEY = "sk-secret-0123456789"
SECRET = [
    f"https://me:{KEY}@host/v1",
    f"https://{KEY}@host",
    f"http://host/x?api_key={KEY}",
    f"http://host/x?n=3&Access-Token={KEY}",
    f"http://host/x?sig={KEY}",
    f"http://host/x?%74oken={KEY}",
    "http://host/x?token",
    f"http://host/x#auth={KEY}",
]
HARMLESS = ["http://host/v1", "https://host:8000/a@b?n=3&model=m#top", "http://[::1]:80/x?monkeys=1", "org/model", ""]


def test_what_looks_like_a_secret():
    assert [holds_secret(url) for url in SECRET] == [True] * len(SECRET)
    assert [holds_secret(url) for url in HARMLESS[:2] + HARMLESS[3:]] == [False] * 4
    assert not any(KEY in shown_address(url) for url in SECRET)
    assert shown_address("https://a:b@host:1/p?q=1#f") == "https://host:1/p"


@pytest.mark.parametrize("url", SECRET)
def test_a_secret_in_any_value_is_refused(url):
    shared = [url]
    for value in (url, [url], {"a": {"b": ["x", url]}}, f"see {url}, please", {"a": shared, "b": shared}):
        with pytest.raises(ValueError, match="holds an address with a user name, a password or a key") as caught:
            check_no_secrets(value)
        assert KEY not in str(caught.value)
    with pytest.raises(ValueError, match="The address holds a user name.* Put it elsewhere.") as caught:
        check_address(url, "The address", "Put it elsewhere.")
    assert KEY not in str(caught.value)


def test_values_without_secrets_pass_also_those_that_contain_themselves():
    loop: list[object] = ["https://host/x?n=1"]
    loop.append({"self": loop})
    for level in range(100):  # a bomb of aliases
        loop = [loop, loop, loop, level]
    check_no_secrets(loop)
    check_no_secrets({"a": None, "b": 1.5, "c": True, "d": "me@host.org", "e": b"http://a:b@c"})


@pytest.mark.parametrize(
    "url", ["host", "ftp://host", "http://", "http://h:99999", "http://[::1", "http://a b/", "http://a\n"]
)
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="^The address (is no address|must begin with http)") as caught:
        check_address(url, "The address", "")
    assert str(caught.value).isprintable()


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("HOUSE_KEY", f"\n {KEY} \n")
    monkeypatch.setenv("EMPTY_KEY", " ")
    assert (read_key("HOUSE_KEY"), read_key("EMPTY_KEY"), read_key("NO_SUCH_KEY")) == (KEY, None, None)
    for wrong in ("a b", "a\nb", "é", "a\x1b"):
        monkeypatch.setenv("HOUSE_KEY", KEY + wrong)
        with pytest.raises(ValueError, match="The key in the environment variable HOUSE_KEY") as caught:
            read_key("HOUSE_KEY")
        assert KEY not in str(caught.value)
    check_variable("my_key2", "api_key_env")
    for name in (KEY, "", "a b", "1A"):
        with pytest.raises(ValueError, match="`api_key_env` is not the name of an environment variable") as caught:
            check_variable(name, "api_key_env")
        assert KEY not in str(caught.value)
    assert shown_variable("abcdef0123") == "the environment variable that `api_key_env` names"
    monkeypatch.setenv("lower", "x")
    assert shown_variable("lower") == "the environment variable lower"
    assert shown_variable("MY_KEY") == "the environment variable MY_KEY"


def test_names_of_fields_that_hold_keys():
    given = {"seed": 0, "max_tokens": 5, "api_key": "x", "more": [{"X-Auth-Token": "y"}], "stop_token_ids": [1]}
    assert secret_fields(given) == ["api_key", "X-Auth-Token"]


def test_a_servers_address_with_a_secret(tmp_path):
    for use_vllm in (True, False):
        with pytest.raises(ValueError, match="`vllm_server_base_url` holds a user name, a password or a key") as caught:
            OnlineDPOConfig(
                str(tmp_path),
                use_cpu=True,
                use_vllm=use_vllm,
                vllm_mode="server",
                vllm_server_base_url=f"http://one:8000,http://me:{KEY}@two",
            )
        assert KEY not in str(caught.value)
