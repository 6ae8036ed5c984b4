"""What a client may say of its work, against the batches that it makes of a task."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.core.errors import UpdateError
from fedcustom.methods import Work
from fedcustom.methods.tuning.local_training import batch_ranges
from fedcustom.methods.tuning.messages import TrainTask, TrainUpdate
from fedcustom.methods.tuning.update_checks import check_figures, work_bounds

works = st.one_of(
    st.builds(Work, epochs=st.floats(0.01, 4)),
    st.builds(Work, steps=st.integers(1, 50)),
    st.builds(Work, examples=st.integers(1, 200)),
    st.builds(Work, epochs=st.floats(0.1, 3), batches=st.integers(1, 60)),
    st.builds(Work, examples=st.integers(1, 200), batches=st.integers(1, 60)),
)


@given(works, st.integers(1, 60), st.integers(0, 500), st.integers(1, 20))
@settings(max_examples=400)
def test_honest_work_is_within_the_bounds(work: Work, count: int, start: int, batch_size: int) -> None:
    ranges = batch_ranges(count, start, batch_size, work)
    bounds = work_bounds(work, count, batch_size)
    assert bounds.least_steps <= len(ranges) <= bounds.most_steps
    assert sum(end - begin for begin, end in ranges) <= bounds.examples


@pytest.mark.parametrize(("work", "steps", "examples"), [
    (Work(steps=5), 1, 10),
    (Work(steps=5), 6, 10),
    (Work(epochs=1), 1, 100),  # FedNova divides by it
    (Work(epochs=1), 6, 100),
    (Work(epochs=1), 1000, 100),
    (Work(epochs=1), 7, 101),
    (Work(epochs=1), 7, 2**50),
    (Work(epochs=1, batches=10), 5, 100),
    (Work(examples=20), 1, 20),
    (Work(epochs=1), True, 100),
])  # fmt: skip
def test_what_the_task_did_not_ask_for_is_refused(work: Work, steps: int, examples: int) -> None:
    task = TrainTask({}, round_number=1, work=work)
    with pytest.raises(UpdateError, match="must be an integer from"):
        check_figures(task, TrainUpdate({}, 100.0, loss=1.0, examples=examples, steps=steps), batch_size=16)


def test_sound_figures_pass() -> None:
    task = TrainTask({}, round_number=1, work=Work(epochs=1))
    check_figures(task, TrainUpdate({}, 100.0, loss=1.0, examples=100, steps=math.ceil(100 / 16)), 16)
