import pytest
import torch
from torch import nn

from core.average import MovingAverage


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_five_updates_against_the_formula_written_out():
    model = network()
    average = MovingAverage(model, 0.4)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    assert average.network.state_dict().keys() == expected.keys() and not average.network.training
    for number in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(6, 3, dtype=torch.float64))
        decay = min(0.4, (1 + number) / (10 + number))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value if value.is_floating_point() else value
        average.update(number)
    for key, value in average.network.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-14)
    assert average.network[1].num_batches_tracked == 5


def test_the_average_is_no_part_of_the_gradient():
    average = MovingAverage(network(), 0.9)
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


@pytest.mark.parametrize(("number", "weight"), [(1, 9 / 11), (100, 0.1), (10**6, 0.1)])
def test_the_first_updates_count_more(number, weight):
    model = network()
    average = MovingAverage(model, 0.9)
    with torch.no_grad():
        model[0].bias += 1.0
    before = average.network[0].bias.clone()
    average.update(number)
    torch.testing.assert_close(average.network[0].bias - before, torch.full((4,), weight, dtype=torch.float64))
