"""What a mistyped name may have been meant to be."""

import difflib
from collections.abc import Iterable


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Up to three of `words` that resemble `word`, whatever their case, the most alike first."""
    known = {name.lower(): name for name in words}
    return [known[name] for name in difflib.get_close_matches(word.lower(), known, cutoff=0.5)]
