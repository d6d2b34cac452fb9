from pathlib import Path

import pandas as pd
import pytest
import torch

from corec import CorecError, backbones, data
from corec.data import tagger
from corec.params import DataParams

TAGS = ["late night", "love", "first great children"]


def test_likelihoods_agree_with_a_plain_forward_of_every_pair() -> None:
    model, tokenizer = backbones.load("tiny", torch.float32)
    tags = tokenizer([f" {tag}" for tag in TAGS])["input_ids"]
    assert len({len(tag) for tag in tags}) > 1
    prompts = torch.tensor([[5, 9, 70], [8, 3, 100]])
    with torch.no_grad():
        found = tagger.log_likelihoods(model.eval(), prompts, tags)
        for row, prompt in enumerate(prompts.tolist()):
            for column, tag in enumerate(tags):
                steps = model(torch.tensor([[*prompt, *tag]])).logits[0].log_softmax(-1)
                wanted = sum(steps[len(prompt) - 1 + place, token] for place, token in enumerate(tag))
                torch.testing.assert_close(found[row, column], wanted, rtol=1e-5, atol=1e-4)


def test_answers_do_not_depend_on_the_batch_and_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    titles = ["A story of love", "Night", "Great house", "Children of the world", "Night"]
    together = tagger.tag(titles, TAGS, "tiny", batch=4)
    assert set(together) <= set(TAGS)
    with monkeypatch.context() as patch:
        patch.setattr(backbones, "load", lambda *_: pytest.fail("the second time the answers come from the cache"))
        assert tagger.tag(titles, TAGS, "tiny") == together
    monkeypatch.setenv("COREC_CACHE", str(tmp_path / "other"))
    assert [tagger.tag([title], TAGS, "tiny", batch=1)[0] for title in titles] == together


def test_missing_categories_are_filled_and_known_ones_stay() -> None:
    items = pd.DataFrame({"title": ["love", "night", "house"], "category": ["Books", None, "Films"]})
    params = DataParams(source="amazon-2018", tagger="tiny")
    filled = data.fill_categories(items, params)
    assert list(filled["category_from"]) == ["metadata", "tagger", "metadata"]
    assert list(filled["category"][::2]) == ["Books", "Films"] and filled["category"][1] in ("Books", "Films")
    quality = tagger.quality(filled, ["Books", "Films"], "tiny")
    assert quality.items == 2 and quality.accuracy in (0, 0.5, 1) and quality.majority == 0.5
    assert tagger.quality(filled, ["Lamps"], "tiny").items == 0
    with pytest.raises(CorecError, match="data.tags is empty and the metadata names no categories"):
        data.fill_categories(items.assign(category=None), params)
    with pytest.raises(CorecError, match="data.required' names category"):
        data.fill_categories(items, params.model_copy(update={"required": ["category"]}))
    with pytest.raises(CorecError, match="Parameter data.tagger: no causal language model '/no/model'"):
        tagger.tag(["love"], TAGS, "/no/model")
    with pytest.raises(CorecError, match="data.tagger: the items of this source have no category"):
        data.fill_categories(items[["title"]], params)
