"""Parsers that turn a sentence into constraints: patterns, embeddings, and a language model with constrained decoding."""

import copy
import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache

from corec import backbones, machine
from corec.controls import Vocabulary
from corec.evidence.text import mean_states
from corec.studies.language import Request, Sentence, phrases, values

FILLER = frozenset("a an the i we you me my our of to in on for with and or it is be so please film films movie movies".split())


def bucket(vocabulary: Vocabulary, name: str, number: float) -> str | None:
    """Label of the value of the attribute `name` that contains a number, by the buckets of the scheme; None without buckets."""
    for attribute in vocabulary.attributes:
        if attribute.name == name and attribute.labels:
            found = attribute.values(pd.Series([number])).iloc[0]
            return str(found[0]) if len(found) else None
    return None


class Grammar:
    """Parser by patterns: the known phrases of each value, their words with typos, and numbers (years, ranks, ratings).

    Longer phrases are matched first, and what they match is removed from the text.

    Parameters
    ----------
    vocabulary
        Attributes and values.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        pairs = [
            (phrase.lower(), name, str(label))
            for name, labels in phrases().items()
            if name != "frames"
            for label, parts in labels.items()
            for phrase in (str(label), *parts["known"])
        ]
        self.pairs = sorted(set(pairs), key=lambda pair: (-len(pair[0]), pair))
        self.words = sorted({word for phrase, *_ in pairs for word in re.findall(r"[a-z]{4,}", phrase)} | FILLER)

    def spell(self, word: str) -> str:
        """The word, or the word of the phrases that it resembles (at most about one letter in five differs)."""
        if len(word) < 4 or not word.isalpha() or word in self.words:
            return word
        return next(iter(difflib.get_close_matches(word, self.words, 1, 0.84)), word)

    def __call__(self, text: str) -> Request:
        """Parse a sentence."""
        text = re.sub(r"[a-z]+", lambda match: self.spell(match[0]), text.lower())
        request: Request = {}
        for phrase, name, label in self.pairs:
            pattern = rf"(?<![\w.-]){re.escape(phrase)}(?![\w-])"
            if re.search(pattern, text):
                text = re.sub(pattern, " ", text)
                if name == "genre" or name not in request:
                    request.setdefault(name, set()).add(label)
        return self.numbers(text, request)

    def numbers(self, text: str, request: Request) -> Request:
        """Add constraints on years, ranks and ratings that occur as numbers."""
        rules = [
            ("era", r"\b(19\d\d)(?:s\b)?"),
            ("era", r"(?<!\d)'?([3-9]0)s\b"),
            ("popularity", r"\b(?:top|first|best known|most (?:watched|popular|seen)) (\d{2,3})\b|\b(\d{2,3}) most"),
            ("rating", r"(?<![\d.])([1-5](?:\.\d)?)(?: (?:stars|points)|\+| or more| out of)"),
            ("rating", r"\brated (?:about |around )?([1-5](?:\.\d)?)"),
        ]
        for name, pattern in rules:
            if name not in request and (match := re.search(pattern, text)):
                number = float(next(group for group in match.groups() if group))
                number = number + 1900 if name == "era" and number < 100 else number
                if label := bucket(self.vocabulary, name, number):
                    request[name] = {label}
        return request


class Nearest:
    """Parser by embeddings: a value is requested if its name or a known phrase resembles a part of the sentence, of 1 to 4 words.

    Parameters
    ----------
    vocabulary
        Attributes and values.
    encoder
        Model and tokenizer of the embeddings (:func:`corec.backbones.sentence_encoder`).
    threshold
        Smallest cosine similarity; of each attribute, the value with the largest one is taken.
    """

    def __init__(self, vocabulary: Vocabulary, encoder: tuple[Any, Any], threshold: float = 0.6) -> None:
        self.encoder, self.threshold, self.names = encoder, threshold, values(vocabulary)
        known = [phrases().get(attribute.name, {}).get(label, {}).get("known", []) for attribute, label in self.names]
        texts = [[f"{attribute.name}: {label}", *part] for (attribute, label), part in zip(self.names, known, strict=True)]
        self.of = np.repeat(np.arange(len(texts)), [len(part) for part in texts])  # value of each text
        self.targets = self.embed([text for part in texts for text in part])

    def embed(self, texts: list[str]) -> np.ndarray:
        """Embeddings of length 1 [texts, width]."""
        found = mean_states(*self.encoder, texts, 24, 64, last=True)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)

    def similarity(self, text: str) -> np.ndarray:
        """Largest cosine similarity of each value with a part of the sentence [values]."""
        words = re.findall(r"[\w'.-]+", text.lower())
        parts = [" ".join(words[start : start + size]) for size in range(1, 5) for start in range(len(words) - size + 1)]
        parts = [part for part in dict.fromkeys(parts) if set(part.split()) - FILLER] or [text or " "]
        best = np.full(len(self.names), -1.0)
        np.maximum.at(best, self.of, (self.embed(parts) @ self.targets.T).max(axis=0))
        return best

    def __call__(self, text: str) -> Request:
        """Parse a sentence."""
        return self.decide(self.similarity(text))

    def decide(self, similar: np.ndarray) -> Request:
        """The request, from the similarities of :meth:`similarity`."""
        best: dict[str, tuple[float, str]] = {}
        for (attribute, label), value in zip(self.names, similar.tolist(), strict=True):
            best[attribute.name] = max(best.get(attribute.name, (self.threshold, "")), (value, label))
        return {name: {label} for name, (_, label) in best.items() if label}

    def tune(self, sentences: Sequence[Sentence], grid: Sequence[float] = tuple(np.arange(0.3, 0.96, 0.05))) -> float:
        """Set the threshold to that with the highest exact match on `sentences`; returns it."""
        similar = [self.similarity(sentence.text) for sentence in sentences]
        scores = []
        for self.threshold in grid:
            scores.append(np.mean([self.decide(row) == part.request for row, part in zip(similar, sentences, strict=True)]))
        self.threshold = float(grid[int(np.argmax(scores))])
        return self.threshold


class Constrained:
    """Parser by a language model that can only generate the values of the scheme.

    The prompt has a few labelled sentences; its keys and values are computed once. After the sentence, the model writes one line
    for each attribute: its name, which is given, and one of the labels or ``any``. At each step, all tokens but those that
    continue such a label are masked.

    Parameters
    ----------
    vocabulary
        Attributes and values.
    backbone
        Name of the language model (:func:`corec.backbones.load`).
    examples
        Labelled sentences of the prompt.
    """

    def __init__(self, vocabulary: Vocabulary, backbone: str, examples: Sequence[Sentence]) -> None:
        self.model, self.tokenizer = backbones.load(backbone, machine.resolve_dtype("auto"))
        self.model.to(machine.device()).eval()
        self.tokenizer.padding_side = "left"
        self.options = {
            attribute.name: ["any", *(label for other, label in values(vocabulary) if other.name == attribute.name)]
            for attribute in vocabulary.attributes
        }
        shots = [f"Request: {part.text}\n" + "".join(self.lines(part.request)) for part in examples]
        self.prompt = self.ids("\n".join(["The constraints of each request:\n", *shots, ""]))
        with torch.inference_mode():
            prompt = torch.tensor([self.prompt], device=self.model.device)
            self.cache = self.model(prompt, past_key_values=DynamicCache(), use_cache=True).past_key_values
        self.heads = {name: self.ids(f"{name}:") for name in self.options}
        self.bodies = {name: [self.ids(f" {label}\n") for label in labels] for name, labels in self.options.items()}

    def lines(self, request: Request) -> list[str]:
        """Lines of a labelled sentence in the prompt."""
        return [f"{name}: {min(request.get(name, {'any'}))}\n" for name in self.options]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def allowed(self, written: list[int]) -> list[int]:
        """Tokens that may follow the tokens that were written after the sentence; none after the last line."""
        for name in self.options:
            head = self.heads[name]
            if len(written) < len(head):
                return [head[len(written)]]
            written = written[len(head) :]
            body = next((body for body in self.bodies[name] if written[: len(body)] == body), None)
            if body is None:
                return sorted({body[len(written)] for body in self.bodies[name] if body[: len(written)] == written})
            written = written[len(body) :]
        return [self.tokenizer.eos_token_id]

    def read(self, written: list[int]) -> Request:
        """The request that was written."""
        request: Request = {}
        for name, labels in self.options.items():
            written = written[len(self.heads[name]) :]
            place = next(place for place, body in enumerate(self.bodies[name]) if written[: len(body)] == body)
            written = written[len(self.bodies[name][place]) :]
            if place:
                request[name] = {labels[place]}
        return request

    @torch.inference_mode()
    def all(self, texts: Sequence[str], batch: int = 16) -> list[Request]:
        """Parse several sentences."""
        longest = sum(len(self.heads[name]) + max(map(len, self.bodies[name])) for name in self.options)
        found = []
        for start in range(0, len(texts), batch):
            requests = [f"Request: {text}\n" for text in texts[start : start + batch]]
            inputs = self.tokenizer(requests, return_tensors="pt", padding=True, add_special_tokens=False).to(self.model.device)
            prompt = torch.tensor(self.prompt, device=self.model.device).expand(len(requests), -1)
            ids = torch.cat([prompt, inputs["input_ids"]], dim=1)  # padding between the prompt and the request is masked
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(requests))
            width = ids.shape[1]
            written = self.model.generate(
                input_ids=ids,
                attention_mask=torch.cat([torch.ones_like(prompt), inputs["attention_mask"]], dim=1),
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=longest,
                prefix_allowed_tokens_fn=lambda _, ids, width=width: self.allowed(ids[width:].tolist()),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            found += [self.read(row[width:].tolist()) for row in written]
        return found
