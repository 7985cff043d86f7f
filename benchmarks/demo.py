"""Measure the time and memory of the demo. The limits on two cores are 6 minutes, 6 GB, and 60 s to the first preference.

python -m benchmarks.demo
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time

_TIME_LIMIT_S, _MEMORY_LIMIT_GB, _FIRST_PREFERENCE_LIMIT_S = 360.0, 6.0, 60.0


def main() -> int:
    started, first_preference_s = time.monotonic(), float("inf")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "charter", "demo", "--data", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
            for line in demo.stdout or ():
                print(line, end="")
                match = re.search(r"preferences=(\d+)", line)
                if match and int(match[1]):
                    first_preference_s = min(first_preference_s, time.monotonic() - started)
    seconds = time.monotonic() - started
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    print(f"\nwhole demo        {seconds:6.0f} s of {_TIME_LIMIT_S:.0f} s")
    print(f"first preference  {first_preference_s:6.0f} s of {_FIRST_PREFERENCE_LIMIT_S:.0f} s")
    print(f"memory            {gigabytes:6.1f} GB of {_MEMORY_LIMIT_GB:.0f} GB")
    is_fast = seconds < _TIME_LIMIT_S and first_preference_s < _FIRST_PREFERENCE_LIMIT_S
    return 0 if is_fast and gigabytes < _MEMORY_LIMIT_GB and demo.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
