"""Embeddings of titles: by their words, by an encoder of sentences, or from the hidden states of a language model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from corec import backbones, machine

WIDTH = 64  # components after whitening
TOPICS = 256  # components of the words


def title_embeddings(titles: list[str], model: str, length: int = 24, batch: int = 64) -> np.ndarray:
    """Embed every title once, as a vector of length 1.

    Parameters
    ----------
    titles
        Titles of the items 1 … n.
    model
        ``tf-idf``: the words and pairs of words, weighted by inverse document frequency, on their first 256 singular vectors
        (Deerwester et al., *Indexing by Latent Semantic Analysis*, 1990). ``minilm``: mean of the last states of
        all-MiniLM-L6-v2, as it was trained. Otherwise the name of a language model (see
        :mod:`corec.backbones`): mean over layers and tokens of its states, whitened. Means of such states are nearly equal for
        all texts, because a few directions dominate them; whitening (principal components scaled to unit variance; Su et al.,
        *Whitening Sentence Representations for Better Semantics and Faster Retrieval*, 2021) removes them.
    length, batch
        Tokens of a title, and titles of a pass.

    Returns
    -------
    Embeddings [items + 1, width]; row 0 (padding) is zero.
    """
    if model == "tf-idf":
        words = weighted_words(titles)
        found = TruncatedSVD(min(TOPICS, min(words.shape) - 1), random_state=0).fit_transform(words)
    elif model == "minilm":
        found = mean_states(*backbones.sentence_encoder(), titles, length, batch, last=True)
    else:
        causal, tokenizer = backbones.load(model, torch.float32, "evidence.text")
        means = mean_states(causal.base_model, tokenizer, titles, length, batch, last=False)
        found = PCA(min(WIDTH, len(means) - 1, means.shape[1]), whiten=True, random_state=0).fit_transform(means)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
    return np.concatenate([np.zeros((1, found.shape[1])), found]).astype(np.float32)


def weighted_words(titles: Sequence[str]) -> Any:
    """TF-IDF of the words and pairs of words of each title, sparse [titles, words]; at least one title needs a word."""
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(titles)


@torch.inference_mode()
def mean_states(model: Any, tokenizer: Any, titles: list[str], length: int, batch: int, last: bool) -> np.ndarray:
    """States [titles, hidden] of `model`, mean over the tokens of each title, of the last layer or mean over all layers."""
    model = model.to(machine.device()).eval()
    tokenizer.padding_side = "right"
    parts = []
    for start in range(0, len(titles), batch):
        texts = [title or " " for title in titles[start : start + batch]]
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt", split_special_tokens=True
        )
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        layers = model(**inputs, output_hidden_states=True).hidden_states[1:]
        states = layers[-1] if last else torch.stack(layers).mean(0)
        real = inputs["attention_mask"][..., None].float()
        parts.append(((states * real).sum(1) / real.sum(1)).cpu().numpy())
    return np.concatenate(parts)
