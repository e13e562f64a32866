"""``python -m qadeploy`` runs the command ``qadeploy``."""

from __future__ import annotations

from qadeploy.cli import main

if __name__ == "__main__":
    main()
