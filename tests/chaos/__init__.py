"""Charter under failure: a program that kills, pauses and starves its parts, and then compares what is left with what must be.

`python -m tests.chaos --help` lists the scenarios. Each is a function of its sizes and a seed; `tests/test_chaos.py` and
`tests/test_broken.py` run them small, and the command runs them at their full size.
"""
