"""What the trainer asks of a process, and the conditions that its losses hand on."""

import pytest
import torch

from dis_ssm.condition import Condition
from dis_ssm.diffusion.gaussian import Diffusion
from dis_ssm.diffusion.process import Process


def trained_for(process: Process, n: int, bins: int, generator) -> tuple[torch.Tensor, ...]:
    t = process.draw_times(n, generator)
    return t, process.bin_times(t, bins)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_times_are_the_integers_that_randint_draws(steps):
    diffusion, generator = Diffusion(num_steps=steps), torch.Generator().manual_seed(3)
    t, bins = trained_for(diffusion, 4000, 4, generator)
    again = torch.Generator().manual_seed(3)
    assert t.equal(torch.randint(steps, (4000,), generator=again))
    assert generator.get_state().equal(again.get_state())
    assert bins.dtype == torch.int64 and bins.tolist() == [4 * i // steps for i in t.tolist()]
    torch.manual_seed(5)
    drawn = diffusion.draw_times(9)
    torch.manual_seed(5)
    assert drawn.equal(torch.randint(steps, (9,)))


def test_losses_hand_a_condition_on_whole():
    diffusion, told = Diffusion(learn_sigma=False), []

    def model(x, t, y):
        told.append(y)
        return y.image * y.label[:, None, None, None]

    x0 = torch.randn(3, 2, 4, 4)
    y = Condition(label=torch.tensor([0, 1, 2]), image=torch.randn(3, 2, 4, 4))
    losses = diffusion.training_losses(model, x0, torch.tensor([1, 50, 999]), y, x0 * 0)
    expected = (y.image * y.label[:, None, None, None]).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["mse"], expected)
    assert told == [y]


def test_a_condition_of_other_rows_is_refused():
    x0, y = torch.randn(3, 2, 4, 4), Condition(label=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="y has 2 rows for 3 images"):
        Diffusion().training_losses(lambda x, t, y: x, x0, torch.tensor([1, 2, 3]), y)
