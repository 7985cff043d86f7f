"""Fault injection: kill, pause and starve Charter's processes, then compare the result with the expected one.

`python -m tests.chaos --help` lists the scenarios. Each is a function of its sizes and a seed. `tests/test_chaos.py` and
`tests/test_broken.py` run them at a small size; the command runs them at full size.
"""
