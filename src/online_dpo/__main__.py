"""``python -m online_dpo`` is the ``online-dpo`` command."""

from __future__ import annotations

from online_dpo.cli.process import run

if __name__ == "__main__":
    run()
