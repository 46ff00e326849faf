"""Measures what the loop learns: plans of cells, many processes, honest intervals, a report."""
