"""Embeddings of titles from the hidden states of a language model."""

import numpy as np
import torch
from sklearn.decomposition import PCA

from corec import backbones, machine

WIDTH = 64  # components after whitening


@torch.inference_mode()
def title_embeddings(titles: list[str], backbone: str, length: int = 24, batch: int = 64) -> np.ndarray:
    """Embed every title once: mean over layers and tokens of the states of `backbone`, whitened, of length 1.

    Means of states are nearly equal for all texts, because a few directions dominate them; whitening (principal components
    scaled to unit variance; Su et al., *Whitening Sentence Representations for Better Semantics and Faster Retrieval*, 2021)
    removes them.

    Parameters
    ----------
    titles
        Titles of the items 1 … n.
    backbone
        Name of a language model (see :mod:`corec.backbones`).
    length, batch
        Tokens of a title, and titles of a pass.

    Returns
    -------
    Embeddings [items + 1, width]; row 0 (padding) is zero.
    """
    model, tokenizer = backbones.load(backbone, torch.float32, "evidence.text")
    model = model.to(machine.device()).eval()
    tokenizer.padding_side = "right"
    parts = []
    for start in range(0, len(titles), batch):
        texts = [title or " " for title in titles[start : start + batch]]
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=length, return_tensors="pt", split_special_tokens=True
        )
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        states = torch.stack(model.base_model(**inputs, output_hidden_states=True).hidden_states[1:]).mean(0)
        real = inputs["attention_mask"][..., None].float()
        parts.append(((states * real).sum(1) / real.sum(1)).cpu().numpy())
    means = np.concatenate(parts)
    whitened = PCA(min(WIDTH, len(means) - 1, means.shape[1]), whiten=True, random_state=0).fit_transform(means)
    whitened /= np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-9)
    return np.concatenate([np.zeros((1, whitened.shape[1])), whitened]).astype(np.float32)
