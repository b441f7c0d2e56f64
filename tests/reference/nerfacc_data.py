"""Rays, samples and packings that the tests of nerfacc_compat share."""

import torch

ALPHAS = torch.tensor([0.4, 0.8, 0.1, 0.8, 0.1, 0.0, 0.9])


RAYS = torch.tensor([0, 0, 0, 1, 1, 2, 2])


PACKED = torch.tensor([[0, 3], [3, 2], [5, 2]])


LENGTHS = torch.tensor([4, 0, 1, 30, 0, 7])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packing(lengths=LENGTHS):
    return torch.stack([lengths.cumsum(0) - lengths, lengths], -1)


def close(a, b, **options):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), **{"rtol": 1e-4, "atol": 1e-4} | options)


def strided(values):
    """The same values with a stride, and one of them with stride 0 beside its contiguous copy."""
    one = values[:1].expand(values.shape)
    return [(torch.stack([values, -values], -1)[..., 0], values), (one, one.contiguous())]


def rays_around(n_rays, distance=3.0):
    generator = torch.Generator().manual_seed(0)
    rays_o = torch.nn.functional.normalize(torch.randn(n_rays, 3, generator=generator), dim=-1) * distance
    target = 0.5 * torch.randn(n_rays, 3, generator=generator)
    return rays_o, torch.nn.functional.normalize(target - rays_o, dim=-1)
