"""What the commands offer and what holds where nobody chooses, for the command line, whose help
shows it, and for the libraries that it calls. Neither PyTorch nor ExecuTorch is imported here."""

from __future__ import annotations

from typing import Literal, get_args

from runtime_py.engine.training_plan import Settings
from runtime_py.loop.policy import LoopPolicy

BUILTIN = "tiny"  # the name of the model that ships with attune

# Export
TARGETS = ("android", "ios")
PRECISIONS = {  # smallest first
    "android": ("8da4w", "8da8w", "none"),
    "ios": ("int4", "int8", "fp16", "none"),
}
TRAIN_WEIGHTS = ("fp32", "int8", "int4")
TRAIN_LENGTHS = (256, 512)  # tokens
LOWEST_YIELD = 0.05  # usable pairs of paraphrases an attempt; below it synthesis is switched off

# Training
RECIPE = LoopPolicy()  # the loop's, so that there is one
SETTINGS = Settings(  # of the run itself
    epochs=RECIPE.epochs,
    fewest_steps=RECIPE.fewest_steps,
    batch=RECIPE.batch,
    learning_rate=RECIPE.learning_rate,
    b_rate_ratio=RECIPE.b_rate_ratio,
    check_every=RECIPE.check_every_steps,
)
SCHEDULES = ("constant", "linear", "cosine")
MemoryMode = Literal["low", "high"]
MEMORY_MODES = get_args(MemoryMode)
MEMORY: MemoryMode = "low"
KEEP_MB = 160.0  # of the forward, with the memory mode high
HELD_OUT = 0.1  # part of the dialogues
STOPPING_FROM = 16  # held-out dialogues, of which half choose the step that is kept
