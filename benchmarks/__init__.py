"""Measurements; `python -m benchmarks.NAME` finds the parts of the recipes as their scripts do."""

import sys
from pathlib import Path

sys.path += map(str, sorted((Path(__file__).parent.parent / "recipes").glob("*/")))
