"""A run's folder: configuration, log.jsonl, timing.jsonl, summary.json, search.png and the checkpoint to resume from.

What the seed decides (configuration, log) and what the clock decides (timing, picture) are kept in separate files, so
that a killed run resumed gives the same configuration and log, byte for byte, as one never killed.
"""
import hashlib
import json
import os
import time
from pathlib import Path

from utils import distributed
from utils.errors import RunError
from utils.files import check_writable, lock, naming, read_json, read_sealed, seal, write_atomic

VERSION = 2
# flags that a resumed run may change: they do not change what it finds
NOT_COMPARED = ("output_dir", "log_wandb", "generations", "level_cache_gb", "save_dir", "drop_config_dir")


def default_folder(task: str, flags: dict) -> str:
    """runs/<task>-<hash of the flags>: the same command finds its run again, an edited one starts another."""
    compared = {key: value for key, value in flags.items() if key not in NOT_COMPARED}
    return f"runs/{task}-{hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:8]}"


def read_log(folder: Path, saved: dict | None = None) -> bytes:
    """The lines of a run's log up to its last checkpoint, `saved`. Raises ValueError naming the file that is
    damaged."""
    saved = saved or read_sealed(folder / "checkpoint.json")
    path = folder / "log.jsonl"
    lines = path.read_bytes()[:saved["log_bytes"]] if path.is_file() else b""
    if hashlib.sha256(lines).hexdigest() != saved["log_sha256"]:
        raise ValueError(f"{path}: not the log that checkpoint.json goes with (wrong checksum)")
    return lines


class Run:
    """The folder of one search, resumed where an earlier run of the same command left off.

    Of several processes the first one reads and writes it; all of them hold its `state`.
    """

    def __init__(self, folder: str | Path, flags: dict, flag: str = "--output_dir", defaults: dict | None = None):
        """`defaults`: what flags were before a program knew them, for a run begun by an earlier version.

        Raises ValueError when the folder cannot be written, is damaged, or holds a run with other flags.
        """
        self.folder = Path(folder)
        self.defaults = defaults or {}
        self.flags = {key: value for key, value in flags.items() if key not in NOT_COMPARED}
        self.generations = flags.get("generations")
        self.inputs: dict[str, str] = {}            # see `check_inputs`
        self._log_bytes, self._log_sha256 = 0, hashlib.sha256()
        check_writable(folder, flag)
        lock(folder, flag)
        self.state = self._resume(flag)             # what the last `checkpoint` was given
        self.began, self._tokens_before = time.time(), (self.state or {}).get("tokens", 0)

    @distributed.from_main
    def _resume(self, flag: str) -> dict | None:
        path, log, timing = (self.folder / name for name in ("checkpoint.json", "log.jsonl", "timing.jsonl"))
        if not path.exists():
            for file in (log, timing, self.folder / "summary.json"):
                file.unlink(missing_ok=True)
            return None
        start_over = f"remove {self.folder} to start over"
        try:
            saved = read_sealed(path)
        except ValueError as error:
            raise ValueError(f"{error}; {start_over}") from error
        if saved.get("version") != VERSION:
            raise ValueError(f"{path}: version {saved.get('version')} instead of {VERSION}; "
                             f"{start_over}")
        state, flags = saved["state"], saved["flags"]
        ours = json.loads(json.dumps(self.flags))
        defaults = {key: value for key, value in self.defaults.items() if key in ours}
        flags = {**json.loads(json.dumps(defaults)), **flags}
        compared = sorted({*flags, *ours} - {*NOT_COMPARED})         # an earlier version compared more
        differing = [f"--{key} {flags.get(key)} there, {ours.get(key)} here" for key in compared
                     if flags.get(key) != ours.get(key)]
        if differing:
            raise ValueError(f"{flag} {self.folder}: holds a run with other flags ({'; '.join(differing[:3])}); use "
                             f"those flags to resume it, or another folder")
        if self.generations is not None:
            self._check_extends(state, self.generations)
        try:
            lines = read_log(self.folder, saved)
        except ValueError as error:
            raise ValueError(f"{error}; {start_over}") from error
        self._log_bytes, self._log_sha256 = len(lines), hashlib.sha256(lines)
        self.inputs = saved.get("inputs", {})
        os.truncate(log, len(lines))                 # a line written after the last checkpoint is computed again
        kept = timing.read_bytes().splitlines(keepends=True)[:state["generation"] + 1] if timing.is_file() else []
        write_atomic(timing, b"".join(kept))
        return state

    def _check_extends(self, state: dict, generations: int) -> None:
        if state["generation"] > generations:
            raise RunError(f"--generations {generations}: the run in {self.folder} is already at generation "
                           f"{state['generation']}; a resumed run can only be extended")

    def check_inputs(self, **checksums: str) -> None:
        """Raises RunError where the flags are those of the run that is resumed, but not what they stand for: its
        measurements would be taken for those of other text, or of other levels. checksums: flag -> of what it gives."""
        for flag, checksum in checksums.items():
            if self.state and self.inputs.get(flag, checksum) != checksum:
                raise RunError(f"--{flag}: not what it was when the run in {self.folder} was begun (another checksum); "
                               f"bring that back to resume it, or give another folder to start over")
        self.inputs = checksums

    def default_to(self, generations: int) -> None:
        """Have that many where --generations is missing. Raises RunError when an earlier run has made more."""
        if self.generations is None:
            if self.state:
                self._check_extends(self.state, generations)
            self.generations = generations

    @property
    def finished(self) -> bool:
        """Whether summary.json is there, whole, and covers all generations asked for; what a missing --generations
        means has to be known by then, see `default_to`."""
        summary = self.summary()
        return (self.state is not None and summary is not None and self.generations is not None
                and self.generations == summary.get("generations"))

    @distributed.from_main
    def summary(self) -> dict | None:
        """What `summarize` was given; None before that, and where it is damaged, so that it is made again."""
        try:
            return read_json(self.folder / "summary.json")
        except ValueError:
            return None

    @distributed.main_only
    def log(self, record: dict, **timing) -> None:
        """Append a line to log.jsonl, and its `timing` (seconds, rates) to timing.jsonl."""
        line = json.dumps(record) + "\n"
        for name, text in (("log.jsonl", line), ("timing.jsonl", json.dumps(timing) + "\n")):
            with naming(self.folder / name), open(self.folder / name, "a") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        self._log_bytes += len(line)
        self._log_sha256.update(line.encode())

    @distributed.main_only
    def checkpoint(self, **state) -> None:
        """Save what is needed to go on from here; `state["generation"]` is the number of finished generations."""
        self.state = state
        write_atomic(self.folder / "checkpoint.json", seal(
            {"version": VERSION, "flags": self.flags, "inputs": self.inputs, "state": state,
             "log_bytes": self._log_bytes, "log_sha256": self._log_sha256.hexdigest()}))

    @distributed.from_main
    def records(self) -> list[dict]:
        """The log so far."""
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def timing(self, tokens: int) -> dict[str, float]:
        """Seconds since this process took up the run, and how many of the run's `tokens` it has spent a second."""
        seconds = time.time() - self.began
        return {"seconds": seconds, "tokens_per_second": (tokens - self._tokens_before) / seconds}

    @distributed.main_only
    def summarize(self, summary: dict) -> None:
        """Write summary.json: what marks a run as finished, so it is written last."""
        write_atomic(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")


def rng_state(rng) -> list:
    """The state of a random.Random as JSON can hold it; `set_rng_state` restores it."""
    version, internal, gauss = rng.getstate()
    return [version, list(internal), gauss]


def set_rng_state(rng, state: list) -> None:
    rng.setstate((state[0], tuple(state[1]), state[2]))


@distributed.main_only
def open_wandb(enabled: bool, flags: dict):
    """A Weights & Biases run, or None. Raises ValueError when it is asked for and not installed."""
    if not enabled:
        return None
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--log_wandb: the wandb package is not installed; pip install wandb, or leave it "
                         "out") from error
    return wandb.init(config=flags)
