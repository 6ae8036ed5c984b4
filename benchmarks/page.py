"""docs/benchmarks.md, from a template and the results alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).parent / "page.md"


def write_page(results: Path, target: Path) -> None:
    """Fill the template with whatever cases have been measured."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "spread": spread,
        "milliseconds": milliseconds,
        "seconds": seconds,
        "percent": percent,
        "size": size,
        "megabytes": megabytes,
    }
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        found=found, limit=least_ratio
    )
    target.write_text(text, encoding="utf-8")


def spread(value: dict[str, float] | None, digits: int = 2) -> str:
    """Median and quartiles."""
    if value is None:
        return ""
    low, high = (f"{value[key]:.{digits}f}" for key in ("low", "high"))
    middle = f"{value['median']:.{digits}f}"
    return middle if low == high else f"{middle} ({low} to {high})"


def milliseconds(value: dict[str, float]) -> str:
    """A median in milliseconds, to two or three digits."""
    found = 1000 * value["median"]
    return f"{found:.2f}" if found < 10 else f"{found:.0f}"


def seconds(value: dict[str, float]) -> str:
    """A median in seconds."""
    return f"{value['median']:.2f} s"


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f} %"


def size(value: float) -> str:
    """Bytes in megabytes."""
    return f"{value / 1e6:.0f} MB"


def megabytes(value: dict[str, float] | None) -> str:
    """A median of bytes in megabytes; older results have none."""
    return "not measured" if value is None else size(value["median"])


def least_ratio(case: dict[str, Any]) -> float | None:
    """Our time over the bare loop's if nothing but the matrix products were left, at the machine's peak."""
    bare = case["engines"].get("bare loop", {})
    profile = case["profile"]
    if "seconds" not in bare:
        return None
    products = profile["gigaflop"] / profile["peak_gigaflop_per_second"] / profile["rounds"]
    return float(products / bare["seconds"]["median"])
