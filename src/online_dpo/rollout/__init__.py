"""Sampling completions of prompts: engines, their options, and the transfer of weights to them."""
