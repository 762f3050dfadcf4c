"""What a mistyped name may have been meant to be, and the phrase that says so."""

import difflib
from collections.abc import Iterable, Sequence

SHOWN = 10  # names in a message


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Up to three of `words` that resemble `word`, whatever their case, the most alike first."""
    known = {name.lower(): name for name in words}
    return [known[name] for name in difflib.get_close_matches(word.lower(), known, cutoff=0.5)]


def did_you_mean(
    word: str, words: Iterable[str], *, near: Sequence[str] = (), prefix: str = ""
) -> str:
    """The phrase of an error message about `word`, which is none of `words`.

    Args:
        word: what was given.
        words: what there is.
        near: what was meant, where that is known without a look at the letters.
        prefix: what stands before each name in the message, such as "train.".

    Returns:
        "did you mean 'a' or 'b'?", the most alike first; where none is alike, "there are 'a', 'b'
        ...", the first ten of `words`; "there are none" without words.
    """
    words = list(words)
    if near := near or nearest(word, words):
        return f"did you mean {' or '.join(repr(prefix + name) for name in near)}?"
    if not words:
        return "there are none"
    some = ", ".join(repr(prefix + name) for name in words[:SHOWN])
    return f"there are {some}{' ...' * (len(words) > SHOWN)}"
