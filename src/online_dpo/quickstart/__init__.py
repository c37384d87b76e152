"""The embedded example: a toy language with a hidden rubric, tiny models trained from scratch, and a run that improves
the policy.
"""
