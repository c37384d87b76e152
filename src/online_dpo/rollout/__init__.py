"""Sampling completions: prompts to groups."""
