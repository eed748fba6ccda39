"""What a person reads of results: Markdown tables, and the picture of a search."""
import io
import math
import subprocess
from collections.abc import Sequence
from pathlib import Path

from utils import distributed
from utils.files import write_atomic


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells, the first one the header, as an aligned Markdown table; floats with four significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":")
                                   for i, width in enumerate(widths)) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}"
    return "–" if value is None else str(value)


def evaluation_rows(evaluations: dict[str, dict[str, dict[str, float]]]) -> list[list[object]]:
    """Table rows of {who: {dataset: {"ppl": …, "kl": …}}}: a perplexity and a KL column for every dataset."""
    datasets = list(dict.fromkeys(dataset for results in evaluations.values() for dataset in results))
    header = ["", *[column for dataset in datasets for column in (f"{dataset} ppl", f"{dataset} KL")]]
    return [header, *[[who, *[results.get(dataset, {}).get(key) for dataset in datasets for key in ("ppl", "kl")]]
                      for who, results in evaluations.items()]]


def commit() -> str:
    """The commit that results are of, in short, with a + where code differs from it; "unknown" outside a checkout."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=7", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno", ":!*.md"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@distributed.main_only
def plot_search(path: str | Path, records: list[dict], found: Sequence[tuple[int, float]], common_tokens: int,
                levels: Sequence[Sequence[float]], row_names: Sequence[str], title: str, level_label: str,
                fitness_fn: str) -> None:
    """search.png: what the search had found over tokens spent, above a map of the winner's levels [rows, blocks].

    found: (tokens spent, fitness) of every new best candidate, all on the same `common_tokens` tokens. Fitness of
    `records`, the log's, is each on its generation's own minibatch, and goes up and down with those.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, picture) = pyplot.subplots(
        2, 1, figsize=(9, 4.4 + 0.3 * len(row_names)), height_ratios=[3, 0.6 + 0.3 * len(row_names)],
        layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    curve.plot([record["tokens"] / 1e6 for record in records], [record["fitness"] for record in records],
               color="tab:gray", marker=".", markersize=3, linewidth=0, alpha=0.5, label="each on its last minibatch")
    if found:
        tokens, values = zip(*found, (records[-1]["tokens"], found[-1][1]))
        curve.step([spent / 1e6 for spent in tokens], values, where="post", color="tab:blue", linewidth=1.5,
                   label=f"all on the same {common_tokens:,} tokens")
        curve.legend(fontsize=8)
    curve.set(xlabel="tokens spent, millions", ylabel=f"{fitness_fn} of the best candidate")
    curve.grid(alpha=0.3)
    image = picture.imshow(levels, aspect="auto", cmap="viridis", interpolation="nearest")
    picture.set_yticks(range(len(row_names)), row_names)
    picture.set(xlabel="block")
    picture.xaxis.get_major_locator().set_params(integer=True)
    for edge in range(1, len(levels[0])):
        picture.axvline(edge - 0.5, color="white", linewidth=0.5)
    values = sorted({value for row in levels for value in row if not math.isnan(value)})
    bar = figure.colorbar(image, ax=picture, label=level_label)
    if len(values) <= 8:
        bar.set_ticks(values, labels=[f"{value:.3g}" for value in values])
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    pyplot.close(figure)
    write_atomic(path, drawn.getvalue())
