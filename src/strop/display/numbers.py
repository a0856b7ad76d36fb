"""Format numbers and times, for people. dash/static/format.js has the same rules.

Percentages have one decimal, losses three, other numbers four significant digits. Numbers below 0.01, as most learning
rates, have an exponent.
"""

from __future__ import annotations


def format_percent(share: float, digits: int = 1) -> str:
    """Return a share, such as 0.75, as "75.0%"."""
    return f"{share:.{digits}%}"


def format_figure(value: float, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, such as "0.3678", "1,234" or, with three, "4.67e-4"."""
    size = abs(value)
    if size and (size < 1e-2 or size >= 1e6):
        number, _, power = f"{value:.2e}".partition("e")
        return f"{number.rstrip('0').rstrip('.')}e{int(power):+d}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.{digits}g}"


def format_decimals(value: float, decimals: int = 3) -> str:
    """Return a number with decimals, as a loss has, but one below 0.1 or from 1,000 with its significant digits."""
    return f"{value:.{decimals}f}" if 0.1 <= abs(value) < 1000 or not value else format_figure(value, 3)


def format_duration(seconds: float) -> str:
    """Return a duration, such as "4.2 s", "12 s", "2 min 6 s", "1 h 05 min" or "3 d 4 h"."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
