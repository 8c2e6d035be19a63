"""Plots as SVG, drawn here by Vega-Lite (the package vl-convert, of the extra `report`): a page needs no program.

Colours are CSS variables of the page, so a plot follows its theme; each bar says in words what it shows.
"""

from __future__ import annotations

from typing import Any

from sft_fast.errors import ConfigError
from sft_fast.inspect.summary import Histogram

WIDTH, HEIGHT = 360, 170
_VEGA_LITE_VERSION = "6.1"
_CONFIG = {
    "background": None,
    "font": "inherit",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
    },
    "axisX": {"grid": False, "labelFlush": False},
    "axisY": {"domain": False, "ticks": False, "tickCount": 4},
    "legend": {
        "labelColor": "var(--muted)",
        "orient": "top",
        "title": None,
        "labelFontSize": 12,
        "symbolType": "square",
    },
    "aria": True,
}


def histogram(
    bins: Histogram, texts: list[str], *, x_title: str, y_title: str, x_format: str = ",d", color: str = "var(--accent)"
) -> str:
    """Bars over a line of numbers; `texts` says in words what each bar shows."""
    values = [
        {"from": start, "to": end, "count": count, "text": text}
        for (start, end, count), text in zip(bins.bins(), texts, strict=True)
    ]
    x_axis = {"title": x_title, "format": x_format, "tickCount": 7}
    spec = {
        "mark": {"type": "bar", "color": color, "binSpacing": 1},
        "encoding": {
            "x": {"field": "from", "type": "quantitative", "bin": "binned", "axis": x_axis},
            "x2": {"field": "to"},
            "y": {
                "field": "count",
                "type": "quantitative",
                "axis": {"title": y_title, "format": "~s", "tickMinStep": 1},
            },
            "description": {"field": "text", "type": "nominal"},
        },
    }
    return _svg(spec, values)


def bars(rows: list[tuple[str, int, str]], *, x_title: str, y_title: str, color: str = "var(--accent)") -> str:
    """A bar for each (name, count, text in words), in their order."""
    spec = {
        "mark": {"type": "bar", "color": color},
        "encoding": {
            "x": {
                "field": "name",
                "type": "nominal",
                "sort": None,
                "axis": {"title": x_title, "labelAngle": 0, "labelOverlap": "greedy"},
                "scale": {"paddingInner": 0.15},
            },
            "y": {
                "field": "count",
                "type": "quantitative",
                "axis": {"title": y_title, "format": "~s", "tickMinStep": 1},
            },
            "description": {"field": "text", "type": "nominal"},
        },
    }
    return _svg(spec, [{"name": name, "count": count, "text": text} for name, count, text in rows])


def reasons(rows: list[tuple[str, int, str]]) -> str:
    """A bar across for each (name, count, text in words), with the count at its end."""
    encoding = {
        "y": {"field": "name", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 160}},
        "x": {
            "field": "count",
            "type": "quantitative",
            "axis": {"title": "records", "format": "~s", "tickMinStep": 1, "grid": True},
        },
        "description": {"field": "text", "type": "nominal"},
    }
    spec = {
        "height": {"step": 26},
        "mark": {"type": "bar", "color": "var(--warn)"},
        "encoding": encoding,
    }
    return _svg(spec, [{"name": name, "count": count, "text": text} for name, count, text in rows])


def balance(rows: list[tuple[int, float, float]]) -> str:
    """Two bars for each number of ranks: (ranks, packs dealt in order, as planned), parts of the mean."""
    names = ("dealt in order", "as planned")
    values = [
        {"ranks": str(ranks), "way": name, "share": share, "text": f"{ranks} ranks, {name}: {share:.2%} longer"}
        for ranks, before, after in rows
        for name, share in zip(names, (before, after), strict=True)
    ]
    scale = {"domain": list(names), "range": ["var(--faint)", "var(--accent)"]}
    spec = {
        "mark": "bar",
        "encoding": {
            "x": {"field": "ranks", "type": "nominal", "sort": None, "axis": {"title": "ranks", "labelAngle": 0}},
            "xOffset": {"field": "way", "sort": list(names)},
            "y": {
                "field": "share",
                "type": "quantitative",
                "axis": {"title": "slowest rank over the mean", "format": ".2~%"},
            },
            "color": {"field": "way", "type": "nominal", "scale": scale},
            "description": {"field": "text", "type": "nominal"},
        },
    }
    return _svg(spec, values)


def _svg(spec: dict[str, Any], values: list[dict[str, Any]]) -> str:
    try:
        import vl_convert
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the page needs the package vl-convert-python for its plots",
            code="missing_package",
            hint="pip install 'sft-fast[report]'",
        ) from error
    whole = {"width": WIDTH, "height": HEIGHT, "padding": 2, "data": {"values": values}, "config": _CONFIG, **spec}
    svg: str = vl_convert.vegalite_to_svg(whole, vl_version=_VEGA_LITE_VERSION)
    # The page sets the width.
    return svg.replace('version="1.1" ', "", 1)
