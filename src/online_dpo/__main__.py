"""``python -m online_dpo`` is the ``online-dpo`` command."""

from __future__ import annotations

import sys

from online_dpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
