"""Tables, plots and a self-contained HTML page, made from run directories only."""

from .page import write_report
from .tables import comparison, comparison_table

__all__ = ["comparison", "comparison_table", "write_report"]
