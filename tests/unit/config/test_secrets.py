"""Tokens are in nothing that a configuration is shown, written or pickled as."""

import copy
import pickle
from pathlib import Path

import pytest

from online_dpo import OnlineDPOConfig

TOKEN = "hf_0123456789secret"


def make_config(folder: Path, **options) -> OnlineDPOConfig:
    return OnlineDPOConfig(output_dir=str(folder), use_cpu=True, report_to=[], **{"hub_token": TOKEN, **options})


def test_no_form_of_a_configuration_holds_the_token(tmp_path):
    args = make_config(tmp_path)
    forms = (repr(args), str(args), args.to_json_string(), str(args.to_sanitized_dict()), str(pickle.dumps(args)))
    assert [TOKEN in form for form in forms] == [False] * 5
    assert pickle.loads(pickle.dumps(args)).hub_token is None


def test_a_token_that_is_given_later_is_not_pickled_either(tmp_path):
    args = make_config(tmp_path, hub_token=None)
    args.set_push_to_hub("me/model", token=TOKEN)
    assert args.hub_token == TOKEN
    assert TOKEN.encode() not in pickle.dumps(args)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_can_still_push(tmp_path, copied):
    args = make_config(tmp_path, model_init_kwargs={"revision": "main"})
    other = copied(args)
    assert (other.hub_token, other.model_init_kwargs) == (TOKEN, {"revision": "main"})
    assert other == args and other is not args
    assert (other.model_init_kwargs is args.model_init_kwargs) == (copied is copy.copy)


@pytest.mark.parametrize("wrong", [f"{TOKEN}\n", f" {TOKEN}", f"{TOKEN}\u00e9", f"{TOKEN}\x1b", ""])
def test_a_token_that_no_header_can_hold_is_refused_without_showing_it(tmp_path, wrong):
    if not wrong:
        assert make_config(tmp_path, hub_token=wrong).hub_token == ""
        return
    with pytest.raises(ValueError, match="`hub_token` must be the token alone") as raised:
        make_config(tmp_path, hub_token=wrong)
    assert TOKEN not in str(raised.value)


@pytest.mark.parametrize("options", [{"token": TOKEN}, {"use_auth_token": TOKEN}, {"x": {"api_key": TOKEN}}])
def test_a_token_for_loading_is_taken_from_the_environment_alone(tmp_path, options):
    with pytest.raises(ValueError, match="`model_init_kwargs` holds.*HF_TOKEN") as raised:
        make_config(tmp_path, model_init_kwargs=options)
    assert TOKEN not in str(raised.value)


def test_asking_for_the_token_of_the_login_is_no_secret(tmp_path):
    assert make_config(tmp_path, model_init_kwargs={"token": True}).model_init_kwargs == {"token": True}
