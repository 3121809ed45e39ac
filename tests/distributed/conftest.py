from __future__ import annotations

import pytest

from stemtomo.distributed import Executor, executor
from stemtomo.distributed.threads import ThreadExecutor


@pytest.fixture(params=["threads", "cluster"])
def workers(request: pytest.FixtureRequest) -> Executor:
    """Each kind of executor in turn: what holds for one must hold for the other."""
    if request.param == "threads":
        return ThreadExecutor(2)
    return executor(request.getfixturevalue("client"))
