"""Imported before anything heavy: keeps the libraries' own chatter off a user's terminal."""

from __future__ import annotations

import logging
import os
import warnings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
