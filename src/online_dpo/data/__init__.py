"""Prompts: from a file or a hub dataset to rows that are checked, converted and tokenised once."""
