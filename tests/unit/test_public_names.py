"""Names that users write stay: what goes, goes with a deprecation."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from online_dpo.cli import main, parser
from online_dpo.cli.main import COMMANDS
from online_dpo.config.registry import KINDS
from online_dpo.doctor.registry import CHECKS
from online_dpo.errors import TrainingInterrupted
from online_dpo.methods import METHODS
from online_dpo.objective.losses import LOSSES
from online_dpo.pairing.strategies import STRATEGIES
from online_dpo.rollout.registry import ENGINES
from online_dpo.training.arguments import OnlineDPOConfig
