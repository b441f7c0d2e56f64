"""View words and Perp-Neg: numbers of the paper and of threestudio's constants, and a model whose answers are known."""

import math

import pytest
import torch

from mvdream_fast.camera import orbit_cameras
from mvdream_fast.core.rng import Stream
from mvdream_fast.diffusion.denoiser import TextCond
from mvdream_fast.guidance.prompts import BACK, FRONT, OVERHEAD, SIDE, led_away, perp_neg, tell, view_words


def at(*azimuths: float, elevation: float = 15.0) -> torch.Tensor:
    """Poses at these azimuths, [V, 4, 4]: 0 stands in front, 90 to the thing's left, 180 behind."""
    return torch.cat([orbit_cameras(1, elevation, azimuth, distance=2.0).c2w for azimuth in azimuths])


@pytest.mark.parametrize(
    ("azimuth", "elevation", "row"),
    [
        (0, 0, FRONT), (44.9, 0, FRONT), (-44.9, 59.9, FRONT), (45.1, 0, SIDE), (90, -10, SIDE), (-134.9, 0, SIDE),
        (135.1, 30, BACK), (180, 0, BACK), (-150, 59.9, BACK), (0, 60.1, OVERHEAD), (100, 89, OVERHEAD),
    ],
)  # fmt: skip
def test_words_by_the_thresholds(azimuth, elevation, row):
    assert view_words(at(azimuth, elevation=elevation)).tolist() == [row]


@pytest.mark.parametrize(("azimuth", "row"), [(29.9, FRONT), (40, SIDE), (-149.9, SIDE), (150.1, BACK)])
def test_words_by_thresholds_of_a_recipe(azimuth, row):
    c2w, states = at(azimuth), torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    assert view_words(c2w, 30.0).tolist() == [row]
    assert tell(TextCond(states, -states), c2w, within_deg=30.0)[0].cond[0, 0, 0] == row


# By hand, with exp(-1/2) = 0.606531 and exp(-1/4) = 0.778801: the front's and the side's weight.
# azimuth 0, all front: -(4 * 0.606531 - 2.426) = -0.000123, and of no share of the side -(4 - 2.426) = -1.574
# azimuth 45, half and half: both -(4 * 0.778801 - 2.426) = -0.689203
# azimuth 90, all side: the first, the other way round
# azimuth 135, half side, half back: -(0.778801 + 0.967) = -1.745801 and -(0.778801 - 0.606) = -0.172801
# azimuth 180, all back: -(1 + 0.967) = -1.967 and -(1 - 0.606) = -0.394
WORKED = {
    0: ((1, 0, 0), -0.000123, -1.574),
    45: ((0.5, 0.5, 0), -0.689203, -0.689203),
    90: ((0, 1, 0), -1.574, -0.000123),
    135: ((0, 0.5, 0.5), -1.745801, -0.172801),
    180: ((0, 0, 1), -1.967, -0.394),
}


@pytest.mark.parametrize("azimuth", WORKED)
def test_shares_and_weights_by_hand(azimuth):
    shares, of_front, of_side = WORKED[azimuth]
    found = perp_neg(at(azimuth))
    torch.testing.assert_close(found.shares, torch.tensor([[*shares, 0.0]]), rtol=0, atol=1e-5)
    assert found.rows.tolist() == [[FRONT], [SIDE]]
    # at the side itself the two pairs of constants differ by 5e-4, and 90 degrees are either 89.99 or 90.01
    torch.testing.assert_close(found.weights, torch.tensor([[of_front], [of_side]]), rtol=0, atol=6e-4)


def plain(azimuth: float) -> tuple[list[float], list[float]]:
    """threestudio's rule with its own words: an interpolation r from front to side, then from side to back."""
    if abs(azimuth) < 90:
        r = 1 - abs(azimuth) / 90
        return [r, 1 - r, 0, 0], [-(4 * math.exp(-r / 2) - 2.426), -(4 * math.exp(-(1 - r) / 2) - 2.426)]
    r = 2 - abs(azimuth) / 90
    return [0, r, 1 - r, 0], [-(math.exp(-r / 2) + 0.967), -(math.exp(-r / 2) - 0.606)]


def test_a_sweep_around_the_object():
    azimuths = [x + 0.5 for x in range(-180, 180)]
    found = perp_neg(at(*azimuths))
    shares, weights = (torch.tensor(x) for x in zip(*map(plain, azimuths), strict=True))
    torch.testing.assert_close(found.shares, shares.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.weights, weights.T.float(), rtol=0, atol=1e-5)
    # the same to the left and to the right, and from degree to degree no jump: the steepest slope is 4 * 0.5 / 90
    torch.testing.assert_close(found.weights, found.weights.flip(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.shares, found.shares.flip(0), rtol=0, atol=1e-5)
    assert found.weights.diff(dim=1).abs().max() < 2 / 90 + 6e-4
    assert found.shares.diff(dim=0).abs().max() < 1 / 90 + 1e-5
    assert found.weights.max() <= 0
    torch.testing.assert_close(found.shares.sum(1), torch.ones(360))


def test_from_above_there_is_nothing_to_avoid():
    found = perp_neg(at(0, 45, 180, elevation=70))
    assert found.shares.tolist() == [[0, 0, 0, 1]] * 3
    assert found.weights.abs().max() == 0


def test_what_views_are_told():
    states = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    sides = TextCond(states, -states)
    c2w = torch.cat([at(0, 45, 157.5), at(10, elevation=80)])
    text, weights = tell(sides, c2w)
    assert (text.cond[:, 0, 0].tolist(), weights, text.away) == ([0, 1, 2, 3], None, None)
    text, weights = tell(sides, c2w, with_perp_neg=True)
    # half front and half side; a quarter side and three of back: 0.25 + 0.75 * 2
    torch.testing.assert_close(text.cond[:, 1, 2], torch.tensor([0, 0.5, 1.75, 3]), rtol=0, atol=1e-5)
    assert text.uncond[:, 0, 0].tolist() == [0, -1, -2, -3]  # of the words that the view would be told
    assert text.away[:, 0, 0].tolist() == [FRONT] * 4 + [SIDE] * 4
    torch.testing.assert_close(weights, perp_neg(c2w).weights)
    half, again = tell(sides.to(torch.bfloat16), c2w, with_perp_neg=True)
    assert {x.dtype for x in (half.cond, half.uncond, half.away)} == {torch.bfloat16}
    assert torch.equal(again, weights)  # as exact as before


def test_led_away_by_hand():
    # One value a channel. e = c - u = (2, 0, 0); the first other's e_1 = (4, 3, 0): along e it is twice e, beside it
    # (0, 3, 0); the second's e_2 = (-6, 0, 1) is (0, 0, 1) beside. c + -0.5 (0, 3, 0) + -2 (0, 0, 1).
    u = torch.tensor([1.0, 1.0, 1.0]).reshape(1, 3, 1, 1)
    c, first, second = (u + torch.tensor(x).reshape(1, 3, 1, 1) for x in ([2.0, 0, 0], [4.0, 3, 0], [-6.0, 0, 1]))
    result = led_away(c, u, torch.cat([first, second]), torch.tensor([[-0.5], [-2.0]]))
    assert result.flatten().tolist() == pytest.approx([3.0, -0.5, -1.0])
    # What is along e alone, be it against it, is left alone, and so is everything where the prompt says nothing.
    along = torch.cat([u + 3 * (c - u), u - 5 * (c - u)])
    torch.testing.assert_close(led_away(c, u, along, torch.tensor([[-0.5], [-2.0]])), c)
    assert led_away(u, u, torch.cat([u, u]), -torch.ones(2, 1)).flatten().tolist() == [1.0, 1.0, 1.0]


def test_led_away_image_by_image_and_for_v_as_for_the_noise():
    stream = Stream(0, 0, "led away")
    c, u, away = (stream.normal(n, 4, 5, 5) for n in (3, 3, 6))
    weights = -stream.uniform(2, 3)
    whole = led_away(c, u, away, weights)
    for i in range(3):
        one = led_away(c[i : i + 1], u[i : i + 1], away[[i, 3 + i]], weights[:, i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], one)
    # v = (eps - sigma z_t) / alpha
    alpha, sigma, z_t = 0.6, 0.8, stream.normal(3, 4, 5, 5)
    v_c, v_u, v_away = ((x - sigma * z_t.repeat(len(x) // 3, 1, 1, 1)) / alpha for x in (c, u, away))
    torch.testing.assert_close(alpha * led_away(v_c, v_u, v_away, weights) + sigma * z_t, whole, rtol=1e-4, atol=1e-4)
