"""Progress of long work: plain lines without a terminal, one changing line on a terminal, nothing for short work."""

import os
import pty
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from charter import progress as progress_module
from charter.connect import connect_bus
from charter.export.dataset import export_dataset
from charter.export.selection import ExportSelection
from charter.lag import CompletionCheck
from charter.progress import format_duration, show_progress
from engine.backups import create_backup, restore_backup
from engine.models import open_model
from engine.progress import WorkProgress, set_display, track_work
from engine.settings import LabelQualitySettings, load_settings
from engine.worker import to_producer_record
from tests.support.records import RecordDatabase, make_preference, make_prompt
from tests.support.waiting import wait_until


def test_plain_lines_have_the_step_the_share_the_rate_and_the_remaining_time(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "INTERVAL_S", 0.01)
    printed = []

    def is_printed(*parts):
        printed.extend(capsys.readouterr().err.splitlines())
        return any(all(part in line for part in parts) for line in printed)

    with show_progress("read p.jsonl", "rows") as progress:
        progress.start_step("computing the hash")
        wait_until(lambda: is_printed("read p.jsonl: computing the hash: ", "so far"))
        progress.start_step("publishing", num_total=200)
        progress.num_done = 50
        wait_until(lambda: is_printed("publishing: 50 of 200 rows, 25%, ", " rows/s, ", " left"))


def test_a_slow_rate_has_a_decimal(monkeypatch):
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 10.0)
    assert (
        progress_module._format_progress(WorkProgress(num_done=6, num_total=12, started_at=0.0), "records")
        == "6 of 12 records, 50%, 0.6 records/s, 10 s left"
    )


def test_the_rate_of_a_step_counts_from_its_beginning(monkeypatch):
    times = iter([100.0, 104.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(times))
    progress = WorkProgress()
    progress.start_step("publishing", num_total=80)
    progress.num_done = 40
    assert progress_module._format_progress(progress, "rows") == "publishing: 40 of 80 rows, 50%, 10 rows/s, 4 s left"


def test_short_work_prints_nothing(capsys):
    with show_progress("read p.jsonl", "rows") as progress:
        progress.num_done = 5
    assert capsys.readouterr().err == ""


def test_error_in_the_work_ends_the_display():
    with pytest.raises(ZeroDivisionError), show_progress("read p.jsonl", "rows"):
        raise ZeroDivisionError


TERMINAL_CODE = """
import sys, threading, time
from charter import progress
progress.DELAY_S = 0.0
with progress.show_progress("read [p].jsonl", "rows") as work:
    work.num_total, work.num_done = 200, 50
    while threading.active_count() < 3:  # the main thread, the display and the refresh of rich
        time.sleep(0.01)
    print("a row is wrong", file=sys.stderr)
    print("to the pipe")
print("end", file=sys.stderr)
"""


def test_terminal_shows_one_line_and_standard_output_stays_in_its_pipe():
    main, other = pty.openpty()
    command = [sys.executable, "-c", TERMINAL_CODE]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other, env=environment) as process:
        os.close(other)
        text = b""
        while chunk := _read(main):
            text += chunk
        assert process.stdout.read() == b"to the pipe\n" and process.wait() == 0
    os.close(main)
    assert b"read [p].jsonl: 50 of 200 rows, 25%" in text and b"a row is wrong\r\n" in text and text.endswith(b"end\r\n")


def _read(descriptor):
    try:
        return os.read(descriptor, 10_000)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_tracked_work_uses_the_display_of_the_process(capsys):
    with track_work("loading the model m") as progress:  # no display: a notebook
        progress.num_done = 1
    shown = []

    @contextmanager
    def display(title, unit):
        shown.append((title, unit))
        yield WorkProgress()

    set_display(display)
    try:
        with track_work("loading the model m"):
            pass
    finally:
        set_display(None)
    assert shown == [("loading the model m", "")] and capsys.readouterr().err == ""


def test_a_model_is_loaded_as_tracked_work(tiny):
    titles = []

    @contextmanager
    def display(title, unit):
        titles.append(title)
        yield WorkProgress()

    set_display(display)
    try:
        open_model(str(tiny))
    finally:
        set_display(None)
    assert titles == [f"loading the model {tiny.name}"]


NESTED_CODE = """
import time
from charter import progress
progress.DELAY_S, progress.INTERVAL_S = 0.0, 0.01
printed, print_progress = [], progress.print_progress
progress.print_progress = lambda *arguments: (print_progress(*arguments), printed.append(arguments))
with progress.show_progress("outer", "rows"), progress.show_progress("inner", "rows") as work:
    work.num_done = 7
    while len(printed) < 3:
        time.sleep(0.01)
"""


def test_work_inside_other_work_does_not_use_the_line_of_the_terminal():
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", NESTED_CODE], stderr=other, env=environment) as process:
        os.close(other)
        text = b""
        while chunk := _read(main):
            text += chunk
        assert process.wait() == 0
    os.close(main)
    assert b"outer" in text and len(re.findall(rb"inner: [^\r\n]*so far\r\n", text)) == text.count(b"inner") >= 3


def test_copies_count_megabytes(tmp_path):
    folder, backup, progress = tmp_path / "data", tmp_path / "backup", WorkProgress()
    RecordDatabase(folder / "charter.duckdb").add(make_prompt("x"))
    (folder / "checkpoints" / "policy-000001").mkdir(parents=True)
    (folder / "checkpoints" / "policy-000001" / "model.safetensors").write_bytes(b"x" * 2_500_000)
    create_backup(folder, backup, None, progress)
    assert (progress.step, progress.num_done, progress.num_total) == ("copying the checkpoints", 3, 3)
    restore_backup(backup, tmp_path / "restored", lambda line: None, progress)
    assert progress.step == "copying" and progress.get_share() == 1.0
    restored = tmp_path / "restored"
    assert (restored / "checkpoints" / "policy-000001" / "model.safetensors").stat().st_size == 2_500_000
    assert (restored / "charter.duckdb").read_bytes() == (backup / "charter.duckdb").read_bytes()


def test_unread_records_are_part_of_the_total(tmp_path):
    settings = load_settings({"data.folder": str(tmp_path / "data")}, environment={})[0]
    bus = connect_bus(settings)
    bus.publish([to_producer_record(make_prompt(f"number {n}")) for n in range(12)])
    check, progress = CompletionCheck(bus, {"live.respond": ("prompts",), "live.critique": ("responses",)}), WorkProgress()
    check.update_progress(progress, num_done=3)
    assert (progress.num_done, progress.num_total) == (3, 15)
    bus.close()


@dataclass
class RecordedProgress(WorkProgress):
    """A WorkProgress that remembers the counts of each finished step."""

    steps: dict = field(default_factory=dict)

    def start_step(self, step, num_total=None):
        self.steps[self.step] = (self.num_done, self.num_total)
        super().start_step(step, num_total)


def test_export_counts_its_rows(tmp_path):
    database, progress = RecordDatabase(tmp_path / "charter.duckdb"), RecordedProgress()
    database.add(make_prompt("x"), *(make_preference(f"p{n}", "x", 0.9) for n in range(5)))
    export_dataset(
        database.store,
        tmp_path / "out",
        "preference",
        ExportSelection(None, ()),
        "jsonl",
        None,
        False,
        LabelQualitySettings(),
        progress,
    )
    assert progress.steps["writing"] == (5, 5)
