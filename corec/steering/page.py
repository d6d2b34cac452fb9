"""The steering demonstration as one HTML file with pre-computed answers, which needs no Python and no network."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corec.steering.session import Session

FILES = Path(__file__).parent
DIGITS = 4


def requests_of(state: dict[str, Any], single: int = 24, pairs: int = 12, triples: int = 4) -> list[tuple[int, ...]]:
    """Select requests for a user: the empty one, then the most frequent values of the candidates, alone, in pairs and in triples.

    Parameters
    ----------
    state
        Result of :meth:`corec.steering.session.Session.open`.
    single, pairs, triples
        Number of requests with one, two and three constraints.

    Returns
    -------
    Sorted value numbers of each request; the values of a request are of different attributes. Each part of a request is
    a request too.
    """
    present = sorted((value for value in state["values"] if value["count"]), key=lambda value: -value["count"])
    # Values that nearly all candidates have, or only one, change little: those near a third of the candidates come first.
    third = len(state["candidates"]) / 3
    useful = sorted(present, key=lambda value: abs(value["count"] - third))
    chosen = [(value["id"],) for value in useful[:single]]
    for size, number in ((2, pairs), (3, triples)):
        groups = itertools.combinations(useful[:12], size)
        different = (group for group in groups if len({value["attribute"] for value in group}) == size)
        chosen += [tuple(sorted(value["id"] for value in group)) for group in itertools.islice(different, number)]
    parts = {part for request in chosen for size in range(len(request)) for part in itertools.combinations(request, size)}
    return [(), *chosen, *sorted(parts - {(), *chosen})]  # a constraint can be removed from every request


def rounded(value: Any) -> Any:
    """Copy of nested values with floats of :data:`DIGITS` decimals."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def collect(session: Session, users: Sequence[int]) -> dict[str, Any]:
    """Open users and answer the requests of :func:`requests_of`; returns what :func:`html` needs.

    Times are left out, because the page does not compute anything.
    """
    names = {user["id"]: user["name"] for user in session.users()}
    states = {}
    for place in users:
        state = session.open(place)
        answers = {" ".join(map(str, request)): session.answer(place, request) | {"ms": None} for request in requests_of(state)}
        states[str(place)] = rounded(state | {"ms": None, "answers": answers})
    about = session.about().removesuffix("Choose constraints; the language model answers each request.")
    return {
        "about": f"{about}The answers were computed before; a grey value has no answer, or no candidate has it.",
        "users": [{"id": str(place), "name": names[str(place)]} for place in users],
        "states": states,
    }


def html(data: dict[str, Any], title: str = "Steering COREC") -> str:
    """A page with the demonstration, its script, its style and its data; it requests nothing from any host."""
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # text of the data cannot end the script
    source = """
const data = JSON.parse(document.getElementById("data").textContent);
const key = (values) => [...values].sort((a, b) => a - b).join(" ");
mount(document.getElementById("steering"), {
  about: data.about,
  users: data.users,
  open: async (user) => data.states[user],
  answer: async (user, values) => data.states[user].answers[key(values)],
  available: (user, values) => key(values) in data.states[user].answers,
});
"""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ margin: 0 auto; max-width: 1200px; padding: 12px; background: Canvas; color: CanvasText; }}
h1 {{ font-size: 1.3em; margin: 0 0 4px; }}
{(FILES / "widget.css").read_text()}
</style>
</head>
<body>
<h1>{title}</h1>
<div id="steering"></div>
<script type="application/json" id="data">{embedded}</script>
<script type="module">
{(FILES / "widget.js").read_text()}
{source}
</script>
</body>
</html>
"""
