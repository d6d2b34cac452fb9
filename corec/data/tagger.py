"""Zero-shot tagger: chooses the tag of a closed list that fits a title best, by the likelihood under a language model.

score(tag | title) = log p(tag | prompt with the title) - log p(tag | prompt without the title). The second term removes the
preference for tags that are likely after any title (Holtzman et al., *Surface Form Competition*, EMNLP 2021).
"""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corec import backbones, files, machine, paths

PROMPT = ("Product:", "\nProduct category:")  # before and after the title

TITLE_TOKENS = 40


def log_likelihoods(model: Any, prompts: Tensor, tags: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability of every tag after every prompt [prompts, tags].

    The prompts are computed once; the tags reuse their keys and values.

    Parameters
    ----------
    model
        A causal language model of transformers.
    prompts
        Token ids [prompts, length], all of equal length.
    tags
        Token ids of each tag.
    """
    longest = max(map(len, tags))
    padded = torch.tensor([[*tag, *[0] * (longest - len(tag))] for tag in tags], device=prompts.device)
    output = model.base_model(input_ids=prompts, use_cache=True)
    after = model.get_output_embeddings()(output.last_hidden_state[:, -1]).float().log_softmax(-1)  # [prompts, vocabulary]
    total = after[:, padded[:, 0]]  # [prompts, tags]
    if longest > 1:
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(tags))
        again = model.base_model(input_ids=padded[:, :-1].repeat(len(prompts), 1), past_key_values=cache, use_cache=True)
        logits = model.get_output_embeddings()(again.last_hidden_state).float()  # [prompts * tags, longest - 1, vocabulary]
        next_tokens = padded[:, 1:].repeat(len(prompts), 1)[..., None]
        rest = (logits.gather(-1, next_tokens) - logits.logsumexp(-1, keepdim=True))[..., 0].view(len(prompts), len(tags), -1)
        real = torch.tensor([[place + 1 < len(tag) for place in range(longest - 1)] for tag in tags], device=prompts.device)
        total = total + (rest * real).sum(-1)
    return total


@torch.inference_mode()
def tag(titles: Sequence[str], tags: Sequence[str], backbone: str, batch: int = 8, prompt: tuple[str, str] = PROMPT) -> list[str]:
    """Choose the best of `tags` for every title; answers are cached on disk.

    Parameters
    ----------
    titles
        Any texts; only the first 40 tokens of each are used.
    tags
        The closed list.
    backbone
        Name of a language model (see :func:`corec.backbones.load`); part of the cache key.
    batch
        Titles per forward pass. Titles of equal length share a pass, so there is no padding.
    prompt
        Text before and after the title.

    Returns
    -------
    One tag per title.

    Raises
    ------
    CorecError
        If the backbone cannot be loaded.
    """
    store = paths.cache_dir() / "tags" / f"{files.digest([backbone, prompt, TITLE_TOKENS, list(tags)])}.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):  # no tags yet, or a damaged file
        known = json.loads(store.read_text())
    new = sorted({title for title in titles if title not in known})
    if new:
        model, tokenizer = backbones.load(backbone, machine.resolve_dtype("auto"), "data.tagger")
        device = machine.device()
        model = model.eval().to(device)
        before = tokenizer(prompt[0])["input_ids"]  # with the beginning-of-text token, if the model has one
        after = tokenizer(prompt[1], add_special_tokens=False)["input_ids"]
        plain = {"add_special_tokens": False, "split_special_tokens": True}  # text of the data is never a special token
        pieces = tokenizer([f" {name}" for name in tags], **plain)["input_ids"]
        encoded = [ids[:TITLE_TOKENS] for ids in tokenizer([f" {title}" for title in new], **plain)["input_ids"]]
        prior = log_likelihoods(model, torch.tensor([before + after], device=device), pieces)
        order, shown = sorted(range(len(new)), key=lambda i: len(encoded[i])), time.monotonic()
        lengths = np.array([len(encoded[i]) for i in order])
        for length in np.unique(lengths):
            rows = [order[place] for place in np.flatnonzero(lengths == length)]
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                prompts = torch.tensor([before + encoded[i] + after for i in part], device=device)
                best = (log_likelihoods(model, prompts, pieces) - prior).argmax(1).tolist()
                known |= {new[i]: tags[place] for i, place in zip(part, best, strict=True)}
                if time.monotonic() - shown > 20:
                    print(f"tagger: {sum(title in known for title in new)} of {len(new)} titles", flush=True)
                    files.write_text(store, json.dumps(known))
                    shown = time.monotonic()
        files.write_text(store, json.dumps(known))
    return [known[title] for title in titles]


class Quality(NamedTuple):
    """Accuracy of the tagger on items with a known category."""

    items: int
    accuracy: float
    majority: float  # accuracy of the most frequent category for all items


def quality(items: pd.DataFrame, tags: Sequence[str], backbone: str, limit: int = 300, seed: int = 0) -> Quality:
    """Measure the accuracy on items whose category comes from the metadata and is one of `tags`.

    Parameters
    ----------
    items
        Columns ``title category category_from``.
    tags, backbone
        See :func:`tag`.
    limit, seed
        Largest number of items, and the seed of the sample.

    Returns
    -------
    Accuracies are NaN if there are no such items.
    """
    known = items[items["category"].isin(list(tags)) & (items["category_from"] == "metadata")]
    if known.empty:
        return Quality(0, float("nan"), float("nan"))
    known = known.sample(min(limit, len(known)), random_state=seed)
    correct = np.array(tag(known["title"].tolist(), tags, backbone)) == known["category"].to_numpy()
    return Quality(len(known), float(correct.mean()), float(known["category"].value_counts(normalize=True).iloc[0]))
