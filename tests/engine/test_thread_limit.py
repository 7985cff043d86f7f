"""A limit of OpenMP below PyTorch's threads is refused, because PyTorch would compute wrong numbers."""

import pytest

from engine.errors import UsageError
from engine.thread_limit import require_thread_limit


@pytest.mark.parametrize("limit", [None, "", "2", "16", "many"])
def test_limit_that_allows_all_threads_is_accepted(monkeypatch, limit):
    monkeypatch.delenv("OMP_THREAD_LIMIT", raising=False)
    if limit is not None:
        monkeypatch.setenv("OMP_THREAD_LIMIT", limit)
    require_thread_limit(2)


def test_limit_below_the_threads_is_refused(monkeypatch):
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with pytest.raises(UsageError) as error:
        require_thread_limit(2)
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and lines[0] == "OMP_THREAD_LIMIT=1 is below the number of threads of PyTorch, 2"


def test_local_model_refuses_the_limit(monkeypatch, tiny):
    from engine.models import open_model

    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with pytest.raises(UsageError, match="OMP_THREAD_LIMIT=1"):
        open_model(str(tiny), threads=2)
