"""What a person sees of a run: one bar for what is computed at the moment. What is not urgent goes to a log file.

runs/<profile>/log has a line, with its time, for each artifact that was found (HIT) or made (MISS), and for whatever
libraries say. VERBOSE=1 shows these lines, too.
"""

import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from dgutils.machine import now
from dgutils.paths import runs_dir

OURS = "dgutils: "  # begins a line that is meant for people, and not for the log
PATIENCE = 600.0  # seconds between two lines on what is computed, where no terminal shows a bar


class Screen:
    """A text file for what others write to stderr: bars are shown in a terminal's last line, lines are given to `line`.

    A bar is what follows a carriage return. Where the stream is no terminal, its state is a line every PATIENCE.
    """

    encoding = "utf-8"  # tqdm draws with ASCII alone otherwise

    def __init__(self, stream: TextIO, line: Callable[[str], None] = lambda line: None):
        self.stream, self.line = stream, line
        self.head = ""  # what stands before every bar
        self.rest = ""  # of the text so far, what has no line's end
        self.told = time.monotonic()

    def write(self, text: str) -> None:
        *lines, rest = (self.rest + text).split("\n")
        for line in lines:
            if line := line.rpartition("\r")[2].strip():
                self.line(line)
        _, bar, state = rest.rpartition("\r")
        self.rest = bar + state
        if lines or bar:
            self.show(state.strip() if bar else "")

    def flush(self) -> None:
        """Nothing waits here."""

    def show(self, state: str) -> None:
        """Replace the last line of the terminal."""
        if self.stream.isatty():
            self._print(f"\r\033[K{self.head}{state}"[: shutil.get_terminal_size().columns + 3], "")
        elif state and time.monotonic() - self.told > PATIENCE:
            self.told = time.monotonic()
            self._print(self.head + state)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar."""
        self._print("\r\033[K" * self.stream.isatty() + line)

    def _print(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.stream, flush=True)


def bar(total: int, label: str, done: int = 0, shown: bool = True) -> tqdm:
    """A bar, with the time left, that leaves nothing behind: in a terminal, in Jupyter, or as a line now and then."""
    in_jupyter = hasattr(sys.stderr, "pub_thread")
    file = sys.stderr if in_jupyter or sys.stderr.isatty() else Screen(sys.stderr)
    return tqdm(total=total, initial=done, desc=label, disable=not shown, leave=False, file=file, nrows=20,
                bar_format="{percentage:3.0f} % |{bar:20}| {remaining} left, {desc}{postfix}")  # fmt: skip


def log_file(profile: str) -> Path:
    """The log of a profile's runs, oldest line first."""
    return runs_dir(profile) / "log"


def note(profile: str, line: str) -> None:
    """Add a line to a profile's log, if that can be written: where it cannot, what is worth keeping says so."""
    with suppress(OSError):
        path = log_file(profile)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{now()} {line}\n")


def tally(profile: str, start: int) -> str:
    """How many artifacts were found and made since the log had so many bytes, as '31 artifacts found, 4 made'."""
    text = ""
    with suppress(FileNotFoundError), open(log_file(profile), "rb") as file:
        file.seek(start)
        text = file.read().decode()
    hit, miss = (set(re.findall(rf"^\S+ {word} (\S+ [0-9a-f]+)", text, re.MULTILINE))
                 for word in ("HIT", "MISS"))  # fmt: skip
    return f"{len(hit - miss)} artifacts found, {len(miss)} made"
