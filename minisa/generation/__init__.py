"""Tokens one after the other: the decoding loop, sampling, guesses, and text out."""
