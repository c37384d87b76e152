from __future__ import annotations

import pytest

from online_dpo.errors import ModelFolderError
from online_dpo.modeling.loading import load_causal_lm
from online_dpo.modeling.tokenizers import check_same_words
from support import tiny


def test_a_reference_that_was_trained_with_other_words(tmp_path):
    folder = tmp_path / "reference"
    tiny.causal_lm().save_pretrained(folder)
    model = load_causal_lm(str(folder), None, False)
    check_same_words(model, tiny.tokenizer())  # there is no tokenizer to compare with
    tiny.tokenizer().save_pretrained(folder)
    check_same_words(model, tiny.tokenizer())
    added = tiny.tokenizer()
    added.add_tokens(["<new>"])
    check_same_words(model, added)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w1"', '"x"').replace('"w2"', '"w1"').replace('"x"', '"w2"'))
    with pytest.raises(ModelFolderError, match=r"token 5 is 'w2' to it and 'w1' to the policy, and 2 tokens differ"):
        check_same_words(model, tiny.tokenizer())
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelFolderError, match="tokenizer.json is no valid JSON"):
        check_same_words(model, tiny.tokenizer())
