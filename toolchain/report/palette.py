"""The reports' colors, for pages and charts alike."""

from __future__ import annotations

INK = "#1f2933"
QUIET = "#616e7c"  # of text that says less
FAINT = "#9aa5b1"  # of axes and of lines behind others
LINE = "#e4e7eb"
ACCENT = "#1f7a8c"
GOOD = "#1a7f5a"
BAD = "#c0362c"
WARNING = "#e9a23b"
SERIES = (ACCENT, WARNING, "#7b5ea7", "#4f9d69", "#c8553d", "#3d6cb9", "#b0728f", "#8b8f3f")
