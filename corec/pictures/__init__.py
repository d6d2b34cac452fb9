"""Pictures that explain one example, for the notebooks. Each module imports only what its pictures show."""


def short(title: str, length: int = 24) -> str:
    """A title of at most `length` characters."""
    return title if len(title) <= length else title[: length - 1].rstrip() + "…"
