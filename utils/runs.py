"""A run's folder: configuration, log.jsonl, timing.jsonl, summary.json, search.png and the checkpoint to resume from.

What the seed decides (configuration, log) and what the clock decides (timing, picture) are kept in separate files, so
that a killed run resumed gives the same configuration and log, byte for byte, as one never killed.
"""
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

VERSION = 1
NOT_COMPARED = ("output_dir", "log_wandb", "generations")   # flags a resumed run may change


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


@contextmanager
def user_errors():
    """Bad input ends in one sentence on standard error. Use it around set-up only: later a traceback is right."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


def check_writable(folder: str | Path, flag: str) -> None:
    """Create `folder`. Raises ValueError naming `flag` when that, or writing a file in it, fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder) / ".writable", "")
        (Path(folder) / ".writable").unlink()
    except OSError as error:
        raise ValueError(f"{flag} {folder}: cannot be written ({error.strerror}); name a folder that can") from error


def check_writable_file(path: str | Path, flag: str) -> None:
    """Raises ValueError naming `flag` when `path` is a folder, or its folder cannot be written."""
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file")
    check_writable(Path(path).parent, flag)


def default_folder(task: str, flags: dict) -> str:
    """runs/<task>-<hash of the flags>: the same command finds its run again, an edited one starts another."""
    compared = {key: value for key, value in flags.items() if key not in NOT_COMPARED}
    return f"runs/{task}-{hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:8]}"


class Run:
    """The folder of one search, resumed where an earlier run of the same command left off."""

    def __init__(self, folder: str | Path, flags: dict, flag: str = "--output_dir"):
        """Raises ValueError when the folder cannot be written, or holds a run with other flags."""
        self.folder = Path(folder)
        self.flags = {key: value for key, value in flags.items() if key not in NOT_COMPARED}
        self.generations = flags.get("generations")
        self.state: dict | None = None              # what the last `checkpoint` was given
        check_writable(folder, flag)
        if (self.folder / "checkpoint.json").exists():
            self._resume(flag)
        else:
            for name in ("log.jsonl", "timing.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        self.began = time.time()

    def _resume(self, flag: str) -> None:
        path = self.folder / "checkpoint.json"
        try:
            saved = json.loads(path.read_text())
            state, flags, log_bytes = saved["state"], saved["flags"], saved["log_bytes"]
            if saved["version"] != VERSION or (self.folder / "log.jsonl").stat().st_size < log_bytes:
                raise ValueError("version or log do not match")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path}: not a readable checkpoint ({error}); remove {self.folder} to start over") from error
        ours = json.loads(json.dumps(self.flags))
        differing = [f"--{key} {flags.get(key)} there, {ours.get(key)} here" for key in sorted({*flags, *ours})
                     if flags.get(key) != ours.get(key)]
        if differing:
            raise ValueError(f"{flag} {self.folder}: holds a run with other flags ({'; '.join(differing[:3])}); use "
                             f"those flags to resume it, or another folder")
        if self.generations is not None and state["generation"] > self.generations:
            raise ValueError(f"--generations {self.generations}: the run in {self.folder} is already at generation "
                             f"{state['generation']}; a resumed run can only be extended")
        self.state = state
        with open(self.folder / "log.jsonl", "r+b") as log:
            log.truncate(log_bytes)                  # a line written after the last checkpoint is computed again

    @property
    def finished(self) -> bool:
        """Whether summary.json is there and covers all generations asked for."""
        return (self.state is not None and (self.folder / "summary.json").exists()
                and self.generations in (None, self.summary()["generations"]))

    def summary(self) -> dict:
        """What `summarize` was given."""
        return json.loads((self.folder / "summary.json").read_text())

    def log(self, record: dict, **timing) -> None:
        """Append a line to log.jsonl, and its `timing` (seconds, rates) to timing.jsonl."""
        for name, line in (("log.jsonl", record), ("timing.jsonl", timing)):
            with open(self.folder / name, "a") as stream:
                stream.write(json.dumps(line) + "\n")

    def checkpoint(self, **state) -> None:
        """Save what is needed to go on from here; `state["generation"]` is the number of finished generations."""
        self.state = state
        log = self.folder / "log.jsonl"
        write_atomic(self.folder / "checkpoint.json", json.dumps(
            {"version": VERSION, "flags": self.flags, "state": state,
             "log_bytes": log.stat().st_size if log.exists() else 0}))

    def records(self) -> list[dict]:
        """The log so far."""
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def summarize(self, summary: dict) -> None:
        """Write summary.json: what marks a run as finished, so it is written last."""
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def rng_state(rng) -> list:
    """The state of a random.Random as JSON can hold it; `set_rng_state` restores it."""
    version, internal, gauss = rng.getstate()
    return [version, list(internal), gauss]


def set_rng_state(rng, state: list) -> None:
    rng.setstate((state[0], tuple(state[1]), state[2]))


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells, the first one the header, as an aligned Markdown table; floats with four significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|")
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


def plot_search(path: str | Path, records: list[dict], levels: Sequence[Sequence[float]], row_names: Sequence[str],
                title: str, level_label: str, fitness_fn: str) -> None:
    """search.png: the best candidate's fitness over tokens spent, above a map of the winner's levels [rows, blocks]."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, picture) = pyplot.subplots(
        2, 1, figsize=(9, 4.4 + 0.3 * len(row_names)), height_ratios=[3, 0.6 + 0.3 * len(row_names)],
        layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    curve.plot([record["tokens"] / 1e6 for record in records], [record["fitness"] for record in records],
               color="tab:blue", marker=".", markersize=4, linewidth=1)
    curve.set(xlabel="tokens spent, millions", ylabel=f"{fitness_fn} of the best candidate,\non its last minibatch")
    curve.grid(alpha=0.3)
    image = picture.imshow(levels, aspect="auto", cmap="viridis", interpolation="nearest")
    picture.set_yticks(range(len(row_names)), row_names)
    picture.set(xlabel="block")
    picture.xaxis.get_major_locator().set_params(integer=True)
    for edge in range(1, len(levels[0])):
        picture.axvline(edge - 0.5, color="white", linewidth=0.5)
    values = sorted({value for row in levels for value in row if value == value})
    bar = figure.colorbar(image, ax=picture, label=level_label)
    if len(values) <= 8:
        bar.set_ticks(values, labels=[f"{value:.3g}" for value in values])
    beside = Path(path).with_suffix(".partial.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, path)


def open_wandb(enabled: bool, flags: dict):
    """A Weights & Biases run, or None. Raises ValueError when it is asked for and not installed."""
    if not enabled:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--log_wandb: the wandb package is not installed; pip install wandb, or leave it out") from error
    return wandb.init(config=flags)
