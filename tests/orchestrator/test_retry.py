"""When a trial is tried again."""

from orchestrator.attempt import failure
from orchestrator.retry import History


def test_losses_are_retried_while_attempts_get_further() -> None:
    history = History()
    for step in (10, 20, 30):
        history.reached(step)
        assert history.may_retry_loss()
    assert history.may_retry_loss(), "one loss without progress is allowed"
    assert not history.may_retry_loss()


def test_a_trial_that_dies_twice_at_the_start_fails() -> None:
    history = History()
    assert history.may_retry_loss()
    assert not history.may_retry_loss()


def test_a_missing_file_is_not_tried_again() -> None:
    assert not failure(FileNotFoundError("gone")).retryable
    assert failure(ConnectionResetError("gone")).retryable
