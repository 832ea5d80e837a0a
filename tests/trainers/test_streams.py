"""Named streams are independent of each other and continue where they stood."""

import pytest
import torch

from trainers.streams import Streams


def test_what_one_stream_draws_does_not_shift_another() -> None:
    first, second = Streams(0), Streams(0)
    first.torch("a").seed()
    torch.rand(100, generator=first.torch("a"))
    assert torch.equal(torch.rand(5, generator=first.torch("b")), torch.rand(5, generator=second.torch("b")))
    assert first.numpy("b").random() == second.numpy("b").random()


def test_purposes_and_seeds_give_different_draws() -> None:
    draws = {float(torch.rand(1, generator=Streams(seed).torch(name))) for seed in (0, 1) for name in ("a", "b")}
    assert len(draws) == 4


def test_a_loaded_state_reaches_generators_that_others_hold() -> None:
    streams = Streams(3)
    held, held_numpy = streams.torch("x"), streams.numpy("x")
    torch.rand(7, generator=held)
    held_numpy.random(7)
    state = streams.state_dict()
    expected = torch.rand(3, generator=held), held_numpy.random(3).tolist()
    fresh = Streams(3)
    own, own_numpy, unused = fresh.torch("x"), fresh.numpy("x"), fresh.torch("later")
    torch.rand(1, generator=unused)
    fresh.load_state_dict(state)
    assert torch.equal(torch.rand(3, generator=own), expected[0])
    assert own_numpy.random(3).tolist() == expected[1]
    assert torch.equal(torch.rand(1, generator=unused), torch.rand(1, generator=Streams(3).torch("later")))


def test_a_state_of_another_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="belongs to seed 1"):
        Streams(0).load_state_dict(Streams(1).state_dict())
