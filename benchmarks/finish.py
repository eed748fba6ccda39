"""What finishing is worth: configurations as a search leaves them, and trained in their own mixture by finish.py.

    python benchmarks/finish.py --out results/finish --jobs 2 --seeds 2 --write_readme

At every budget three configurations: uniform (for depth ShortGPT's), random, searched; each as it is and finished, but
for the random one, of which only the latter is. All are evaluated on held-out text, and with --other_data on text of
another kind. Seeds differ in calibration text, search and training; databases are built once. With --auto_round PYTHON,
an interpreter that has auto-round 0.16.1, uniform bitwidths by that, too. Finished parts are not run again.
"""
import argparse
import json
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from benchmarks.programs import claim, run, sparsity_step, write_readme
from utils.files import write_atomic
from utils.report import format_table

DEPTH = ["--generations", "20", "--offspring", "24", "--tokens_per_selection", "1024", "8192",
         "--survivors_per_selection", "2", "1", "--initial_tokens", "1024", "--init", "measured"]
LEVELS = ["--generations", "10", "--offspring", "24", "--tokens_per_selection", "512", "2048", "4096",
          "--survivors_per_selection", "4", "2", "1", "--initial_tokens", "1024", "--init", "measured", "--screen", "4"]
RANDOM = ["--generations", "0", "--init", "random", "--initially_generated", "1", "--no_eval", "--screen", "1"]
