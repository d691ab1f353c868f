"""Results as tables for a terminal, as Markdown, and as pictures. A result is what a benchmark's line of JSON holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tritium.core import ConfigError

Result = Mapping[str, Any]
_Column = tuple[str, str, float, str]
"""Key (a.b for b of a), head, factor, format."""

COLUMNS: dict[str, tuple[_Column, ...]] = {
    "ops": (("op", "op", 0, ""), ("sizes", "sizes", 0, ""), ("us", "us", 1, ".2f"), ("floor_us", "floor us", 1, ".2f"),
            ("share", "% of floor", 100, ".1f"), ("form", "form", 0, "")),
    "decode": (("rows", "rows", 1, "d"), ("context", "context", 1, ",d"), ("ms", "ms a step", 1, ".3f"),
               ("tokens_per_second", "tokens/s", 1, ",.1f"), ("tokens_per_second_each", "each", 1, ",.1f"),
               ("bytes", "GB", 1e-9, ".3f"), ("share", "% of roofline", 100, ".1f"), ("gap_us", "gap us", 1, ".1f"),
               ("host_us", "not graph us", 1, ".1f")),
    "kernels": (("rows", "rows", 1, "d"), ("launches", "launches", 1, ".1f"), ("own_us", "own us a step", 1, ".1f"),
                ("each_us", "own us", 1, ".2f"), ("idle_us", "idle us", 1, ".1f"), ("lasts_us", "lasts us", 1, ".2f"),
                ("grid", "grid", 0, ""), ("kernel", "kernel", 0, "")),
    "prefill": (("tokens", "tokens", 1, ",d"), ("seconds", "s", 1, ".3f"), ("tokens_per_second", "tokens/s", 1, ",.0f"),
                ("share_of_dot", "% of dot", 100, ".1f")),
    "start": (("start", "start", 1, "d"), *((phase, f"{phase} s", 1, ".2f") for phase in
              ("imports", "load", "plan", "weights", "pools", "kernels", "self_test", "graphs")),
              ("to_first_token", "to first token s", 1, ".2f"), ("ttft_first", "first TTFT ms", 1e3, ".1f"),
              ("ttft_last", "last TTFT ms", 1e3, ".1f")),
    "serve": (("clients", "clients", 1, "d"), ("tokens_per_second", "tokens/s", 1, ",.1f"),
              *((f"{kind}.{q}", f"{kind.upper()} {q} ms", 1e3, ".2f") for kind in ("ttft", "tpot", "itl")
                for q in ("p50", "p99")), ("errors", "errors", 1, "d"),
              ("step_us.gap", "gap us", 1, ".1f")),
    "speculation": (("rows", "rows", 1, "d"), ("context", "context", 1, ",d"),
                    ("tokens_per_second", "tokens/s", 1, ",.1f"), ("tokens_per_second_without", "without", 1, ",.1f"),
                    ("ratio", "ratio", 1, ".3f"), ("tokens_per_forward", "a forward", 1, ".2f")),
    "cache": (("workload", "workload", 0, ""), ("requests", "requests", 1, ",d"), ("tokens", "prompt tokens", 1, ",d"),
              ("computed", "computed", 1, ",d"), ("fewest", "fewest", 1, ",d"), ("share", "% reused", 100, ".1f"),
              ("ratio", "speed, on / off", 1, ".3f")),
    "fill": (("rows", "rows", 1, "d"), ("context", "context", 1, ",d"), ("pages_used", "pages", 1, ",d"),
             ("pages_total", "of", 1, ",d"), ("peak_bytes", "peak GB", 1e-9, ".2f"),
             ("planned_bytes", "planned GB", 1e-9, ".2f"), ("complete", "complete", 0, ""), ("alike", "alike", 0, ""),
             ("as_alone", "% as alone", 100, ".0f")),
}  # fmt: skip


def head(kind: str) -> str:
    return _aligned(kind, [name for _, name, _, _ in COLUMNS[kind]])


def line(kind: str, cell: Result) -> str:
    return _aligned(kind, _texts(kind, cell)) + (f"  {cell['skipped']}" if "skipped" in cell else "")


def markdown(result: Result) -> str:
    """A table of the cells; of a decode matrix, batch by context."""
    kind, cells = result["bench"], result["cells"]
    if kind != "decode":
        heads, rows = [name for _, name, _, _ in COLUMNS[kind]], [_texts(kind, cell) for cell in cells]
    else:
        rows_of, contexts = _axes(cells)
        at = {(cell["rows"], cell["context"]): cell for cell in cells}
        heads = ["rows", *map(words, contexts)]
        rows = [[str(r), *(_step(at.get((r, c)), ", ") for c in contexts)] for r in rows_of]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell or "-" for cell in row) + " |" for row in lines)


def plot(result: Result, path: Path) -> None:
    """The roofline with a point for each cell, and the decode matrix beside it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib", hint="pip install 'tritium[plot]'") from None

    ceilings, decode = result["ceilings"], result["bench"] == "decode"
    cells = [cell for cell in result["cells"] if "skipped" not in cell]
    figure = Figure(figsize=(14 if decode else 8, 5), layout="constrained")
    axes = figure.add_subplot(1, 2 if decode else 1, 1)
    points = [(cell["flops"] / cell["bytes"], cell["flops"] / (cell["ms"] / 1e3 if decode else cell["us"] / 1e6))
              for cell in cells]
    ridge = ceilings["dot"] / ceilings["read"]
    edges = min([x for x, _ in points] + [ridge]) / 2, max([x for x, _ in points] + [ridge]) * 2
    axes.plot([edges[0], ridge, edges[1]], [edges[0] * ceilings["read"] / 1e12, *[ceilings["dot"] / 1e12] * 2], "k-")
    axes.scatter([x for x, _ in points], [y / 1e12 for _, y in points], s=18, zorder=3)
    for cell, (x, y) in zip(cells, points):
        name = f"{cell['rows']} x {words(cell['context'])}" if decode else cell["op"]
        axes.annotate(name, (x, y / 1e12), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte that must move", ylabel="TFLOP/s",
             title=f"{result['model']} on {ceilings['device']}: {ceilings['read'] / 1e9:,.0f} GB/s, "
                   f"{ceilings['dot'] / 1e12:,.1f} TFLOP/s")
    if decode:
        _matrix(figure.add_subplot(1, 2, 2), result["cells"])
    figure.savefig(path, dpi=150)


def words(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def _matrix(axes: Any, cells: Sequence[Result]) -> None:
    rows_of, contexts = _axes(cells)
    shares = [[float("nan")] * len(contexts) for _ in rows_of]
    for cell in cells:
        i, j = rows_of.index(cell["rows"]), contexts.index(cell["context"])
        if "skipped" not in cell:
            shares[i][j] = 100 * cell["share"]
        axes.text(j, i, _step(cell, "\n"), ha="center", va="center", fontsize=7)
    axes.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto", alpha=0.7)
    axes.set_xticks(range(len(contexts)), [words(context) for context in contexts])
    axes.set_yticks(range(len(rows_of)), [str(rows) for rows in rows_of])
    axes.set(xlabel="context", ylabel="rows", title="a decode step, and its share of the measured roofline")


def _axes(cells: Sequence[Result]) -> tuple[list[int], list[int]]:
    return sorted({cell["rows"] for cell in cells}), sorted({cell["context"] for cell in cells})


def _step(cell: Result | None, between: str) -> str:
    """A cell of the decode matrix in words."""
    if cell is None or "skipped" in cell:
        return "-"
    return between.join((f"{cell['ms']:.2f} ms", f"{cell['tokens_per_second']:,.0f} tokens/s", f"{cell['share']:.0%}"))


def _texts(kind: str, cell: Result) -> list[str]:
    out = []
    for key, _, factor, form in COLUMNS[kind]:
        value: Any = cell
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        out.append("" if value is None else format(value * factor if factor not in (0, 1) else value, form))
    return out


def _aligned(kind: str, texts: Sequence[str]) -> str:
    widths = [max(9, len(name) + 2) if factor else {"sizes": 42, "op": 18, "workload": 42}.get(key, 20)
              for key, name, factor, _ in COLUMNS[kind]]
    return "  ".join(text.rjust(width) if factor else text.ljust(width)
                     for text, width, (_, _, factor, _) in zip(texts, widths, COLUMNS[kind]))
