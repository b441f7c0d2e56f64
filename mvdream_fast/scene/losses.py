"""Regularisers of a rendered field: small functions of what the renderer returns; their weights live in the recipes."""

import torch


def orientation_loss(
    weights: torch.Tensor, normals: torch.Tensor, directions: torch.Tensor, opacity: torch.Tensor
) -> torch.Tensor:
    """Penalise normals that face away from the camera: sum w max(0, n . d)^2 over the rays that hit anything.

    weights: [S], taken as constants. normals, directions: [S, 3], the ray's direction at each sample. opacity: [R].
    Returns: scalar, 0 without samples. Source: Verbin et al., arXiv 2112.03907, eq. 11.
    """
    facing_away = (normals * directions).sum(-1).clamp(min=0)
    n_hit = (opacity > 0).sum().clamp(min=1)
    return (weights.detach() * facing_away**2).sum() / n_hit


def sparsity_loss(opacity: torch.Tensor) -> torch.Tensor:
    """Mean of sqrt(opacity^2 + 0.01): [R] -> scalar, 0 without rays."""
    return torch.sqrt(opacity**2 + 0.01).sum() / max(opacity.numel(), 1)


def opaque_loss(opacity: torch.Tensor) -> torch.Tensor:
    """Binary entropy of the opacity, clamped to [1e-3, 1 - 1e-3]: [R] -> scalar, 0 without rays."""
    o = opacity.clamp(1e-3, 1 - 1e-3)
    return -(o * torch.log(o) + (1 - o) * torch.log1p(-o)).sum() / max(opacity.numel(), 1)


def z_variance_loss(z_variance: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
    """Mean depth variance over the rays of opacity above 0.5: [R], [R] -> scalar, 0 where there is none."""
    solid = (opacity > 0.5).to(z_variance.dtype)
    return (z_variance * solid).sum() / solid.sum().clamp(min=1)


def eikonal_loss(slopes: torch.Tensor) -> torch.Tensor:
    """Mean of (|grad f| - 1)^2, zero for a signed distance f: slopes |grad f| [P] -> scalar, 0 without points.

    Source: Gropp et al. 2020, "Implicit Geometric Regularization", arXiv 2002.10099, eq. 2.
    """
    return (slopes - 1).square().sum() / max(slopes.numel(), 1)
