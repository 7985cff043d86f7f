"""The fault log and the crash journal across real processes."""

import signal
import subprocess
import sys

import pytest

from engine.crash_journal import CrashJournal, FaultLog

CODE = """
import faulthandler, os, signal, sys
from pathlib import Path
from engine.bus.port import ConsumerRecord
from engine.crash_journal import CrashJournal, FaultLog
folder = Path(sys.argv[1])
fault_log = FaultLog(folder / "0.fault")
journal = CrashJournal(folder / "stage", "0", topic_ids={"prompts": "id"}, had_fault=fault_log.had_fault)
journal.mark_started([ConsumerRecord("prompts", 3, 7, b"k", b"v", (), 0)])
if sys.argv[2] == "exit":
    journal.clear()
elif sys.argv[2] == "abort":
    os.abort()
else:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def end_process(folder, how):
    return subprocess.run([sys.executable, "-c", CODE, str(folder), how], capture_output=True, check=False).returncode


@pytest.mark.parametrize(
    ("how", "code", "count"),
    [("abort", -signal.SIGABRT, (1, 1)), ("kill", -signal.SIGKILL, (1, 0)), ("exit", 0, None)],
)
def test_next_process_counts_the_end_of_the_last_one(tmp_path, how, code, count):
    assert end_process(tmp_path, how) == code
    fault_log = FaultLog(tmp_path / "0.fault")
    journal = CrashJournal(tmp_path / "stage", "0", topic_ids={"prompts": "id"}, had_fault=fault_log.had_fault)
    counts = {name: (c.ends, c.crashes) for name, c in journal.crash_counts().items()}
    assert counts == ({"prompts-id-3-7": count} if count else {})
    journal.close()
    fault_log.close()


def test_process_that_ended_while_it_wrote_the_file_counts_for_no_record(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "0.working").write_bytes(b'{"records": ["prompts-id-3')
    journal = CrashJournal(tmp_path / "stage", "0", topic_ids={"prompts": "id"})
    assert journal.crash_counts() == {}
    journal.close()


def test_stop_signal_after_the_journal_is_closed_changes_nothing(tmp_path):
    journal = CrashJournal(tmp_path / "stage", "0", topic_ids={"prompts": "id"})
    journal.close()
    journal.note_stop()
    assert (tmp_path / "stage" / "0.working").read_bytes() == b""
