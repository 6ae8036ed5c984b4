"""Tables, plots and one self-contained HTML page, from run directories alone."""

from .page import write_report
from .tables import comparison, comparison_table

__all__ = ["comparison", "comparison_table", "write_report"]
