"""Streams of dialogues by a committed recipe, the same bytes for the same seed."""
