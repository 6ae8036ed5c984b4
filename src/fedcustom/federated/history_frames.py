"""History of a run as data frames: rounds, and clients in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .norm_gate import NORMS, STEPS
from .run_directory import Row

if TYPE_CHECKING:
    import pandas as pd

COUNTED = ("cohort", "answered", "left_out", "late")
"""What a round's line lists by client; a frame of rounds has how many there are."""

SUMMED = ("bytes_up", "bytes_down")
"""What a round's line has by client and a frame of rounds in total."""

TOTALS = ("bytes_up_total", "bytes_down_total")
"""The sums over clients so far."""

CLIENT_COLUMNS = (
    *("round", "client", "bytes_up", "bytes_down", "answered", "left_out", "late"),
    *("norm", "steps"),
)


def round_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One row a round, with columns that do not depend on how many clients there are.

    Lists of clients are counted and bytes summed over clients, both 0 in round 0, which asks nobody; norms
    and steps of single clients are left out (:func:`client_frame` has them); other figures that are nested
    have dotted names, and are NaN in rounds that lack them.
    """
    import pandas as pd

    return pd.DataFrame([round_figures(row) for row in rows])


def client_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One row for each client that was asked in a round, in the order in which they were asked."""
    import pandas as pd

    records = [
        (
            row["round"],
            client,
            row["bytes_up"].get(client, 0),
            row["bytes_down"].get(client, 0),
            client in answered,
            row["left_out"].get(client),
            row["late"].get(client, 0),
            row.get(NORMS, {}).get(client),
            row.get(STEPS, {}).get(client),
        )
        for row in rows
        if "cohort" in row
        for answered in [set(row["answered"])]
        for client in row["cohort"]
    ]
    return pd.DataFrame(records, columns=list(CLIENT_COLUMNS))


def round_figures(row: Row) -> dict[str, Any]:
    """The figures of a round's line by dotted name, as many for a thousand clients as for two
    (:func:`round_frame`).
    """
    flat: dict[str, Any] = {"round": row["round"]} | dict.fromkeys((*COUNTED, *SUMMED, *TOTALS), 0)
    for key, value in row.items():
        if key in (NORMS, STEPS):
            continue
        if key in COUNTED:
            flat[key] = len(value)
        elif key in SUMMED:
            flat[key] = sum(value.values())
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat
