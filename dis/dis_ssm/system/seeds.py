"""Seeds for everything random, derived from what it is for."""

import hashlib


def derive_seed(*key: str | int) -> int:
    """A seed in [0, 2^63) that differs for every key: the head of a SHA-256 of it."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1
