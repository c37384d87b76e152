"""Prompts: loaded from a file or the hub, checked, converted and tokenised once."""
