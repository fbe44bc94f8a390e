"""Heads as networks, and the losses they are trained with. Knows: torch. Never: files, text."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["LOSSES", "ON_LOG", "ORDERING", "OnceHead", "PaperHead", "loss"]

ON_LOG = ("log-l1", "log-huber", "log-mse", "quantiles")
"""Losses on the natural log of the remaining tokens."""
ON_TOKENS = ("l1", "huber", "mse")
"""Losses on the remaining tokens themselves, in hundreds."""
ORDERING = ("listmle", "pairwise")
"""Losses on the order alone: the scores are fitted to log tokens afterwards, by one scale and one shift."""
LOSSES = (*ON_LOG, *ON_TOKENS, *ORDERING)

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
SCALE = 100.0


class PaperHead(nn.Module):
    """The published method's: eight Linear layers, ReLU between, one number of tokens."""

    def __init__(self, hidden: int, width: int = 1024, layers: int = 8) -> None:
        super().__init__()
        sizes = [hidden, *[width] * (layers - 1)]
        stack: list[nn.Module] = []
        for before, after in zip(sizes, [*sizes[1:], 1], strict=True):
            stack += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*stack[:-1])
        self.scale = nn.Parameter(torch.tensor([SCALE, 0.0]), requires_grad=False)
        """Factor and shift behind the last layer, set by the loss."""

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(embedding)
        return out.squeeze(-1) * self.scale[0] + self.scale[1]


class OnceHead(nn.Module):
    """Prompt embedding, features and perhaps the served model's identity to log remaining tokens."""

    def __init__(
        self, hidden: int, features: int, models: int = 0, *, width: int = 192, dropout: float = 0.2, outputs: int = 1
    ) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(hidden), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(features), requires_grad=False)
        self.spread = nn.Parameter(torch.ones(features), requires_grad=False)
        self.narrow = nn.Linear(hidden, 64)
        self.known = nn.Embedding(models + 1, 16) if models else None
        inside = 64 + 1 + features + (16 if models else 0)
        self.layers = nn.Sequential(
            nn.Linear(inside, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, outputs),
        )
        self.scale = nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)

    def spreads(self, embedding: torch.Tensor, features: torch.Tensor) -> None:
        """Take mean and spread of the inputs from the training data."""
        self.mean.copy_(embedding.mean(0))
        self.shift.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp(min=0.05))

    def forward(
        self, embedding: torch.Tensor, features: torch.Tensor, model: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[n]; the median where there are quantiles."""
        out = self.quantiles(embedding, features, model)
        middle = out[:, out.shape[1] // 2] if out.shape[1] > 1 else out[:, 0]
        return middle * self.scale[0] + self.scale[1]

    def quantiles(self, embedding: torch.Tensor, features: torch.Tensor, model: torch.Tensor | None) -> torch.Tensor:
        here = (embedding.abs().sum(dim=1, keepdim=True) > 0).to(embedding.dtype)
        parts = [
            self.narrow((embedding - self.mean) * 8.0 * here) * here,
            here,
            ((features - self.shift) / self.spread).clamp(-6.0, 6.0),
        ]
        if self.known is not None and model is not None:
            parts.append(self.known(model))
        out: torch.Tensor = self.layers(torch.cat(parts, dim=1))
        return out


def loss(kind: str, said: torch.Tensor, remaining: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A number to make small. ``said``: [n], or [n, quantiles]; ``remaining``: tokens; ``weight``: of each row."""
    log = remaining.log()
    if kind == "quantiles":
        levels = torch.tensor(LEVELS, dtype=said.dtype)
        miss = log[:, None] - said
        return (torch.maximum(levels * miss, (levels - 1) * miss).mean(1) * weight).mean()
    if kind == "listmle":
        return _listmle(said, remaining)
    if kind == "pairwise":
        return _pairwise(said, log)
    on_log = kind in ON_LOG
    miss = said - (log if on_log else remaining / SCALE)
    each = {
        "l1": lambda: miss.abs(),
        "huber": lambda: nn.functional.huber_loss(miss, torch.zeros_like(miss), reduction="none", delta=0.5),
        "mse": lambda: miss.square(),
    }[kind.removeprefix("log-")]()
    return (each * weight).mean()


def _listmle(score: torch.Tensor, remaining: torch.Tensor, size: int = 32) -> torch.Tensor:
    """Minus the log likelihood of the true order under Plackett and Luce, in lists of ``size``, longest first."""
    rows = len(score) // size * size
    if not rows:
        size = rows = len(score)
    lists, truth = score[:rows].view(-1, size), remaining[:rows].view(-1, size)
    ordered = lists.gather(1, truth.argsort(dim=1, descending=True))
    rest = ordered.flip(1).logcumsumexp(1).flip(1)
    return (rest - ordered).mean()


def _pairwise(score: torch.Tensor, log: torch.Tensor) -> torch.Tensor:
    """Logistic loss of each row against another of the batch, weighted by how far apart they truly are."""
    other = torch.roll(torch.arange(len(score)), len(score) // 2 | 1)
    apart = log - log[other]
    return (nn.functional.softplus(-(score - score[other]) * apart.sign()) * apart.abs().clamp(max=2.0)).mean() / (
        math.log(2)
    )
