"""Grounding DINO."""
