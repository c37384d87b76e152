"""The embedded example: a small language with a hidden rubric, models made from nothing, and a run that improves
them.
"""
