"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table


def plain_table(
    heads: Sequence[str], texts: Collection[str] = (), whole: Collection[str] = ()
) -> Table:
    """Without lines. Columns are numbers, aligned to the right, but for those whose heads are
    ``texts``; where there is too little room, ``whole`` ones keep to one line."""
    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(
            head,
            justify="left" if head in texts else "right",
            overflow="fold",
            no_wrap=head in whole,
        )
    return table
