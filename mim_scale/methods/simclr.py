"""SimCLR: two augmented crops of a sample agree, and are told apart from those of its group.

Method: section 6; Chen et al. 2002.05709. The group is a fixed number of neighbouring positions, never what else is in
the micro-batch, so a sample's loss does not depend on how batches are cut.
N samples, G of a group, B = 2 N views, the two of a sample side by side, C features, P projected ones.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mim_scale.config import Checkpointing, PretrainConfig, SimClrConfig
from mim_scale.methods.augment import augment
from mim_scale.methods.chunks import losses_by_chunk
from mim_scale.methods.masked import picture
from mim_scale.methods.method import Losses, SimilarityPreview
from mim_scale.methods.targets import at_least_float32
from mim_scale.methods.views import make_views
from mim_scale.methods.watch import deviation, effective_rank
from mim_scale.models.blocks import initialise
from mim_scale.models.build import build_encoder
from mim_scale.streaming.device import TensorBatch

PART = "contrast"


class Projection(nn.Module):
    """Features [B, C] -> what is compared [B, P]."""

    def __init__(self, width: int, projection: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, projection)

    def forward(self, features: Tensor) -> Tensor:
        """Linear, ReLU, Linear."""
        result: Tensor = self.fc2(F.relu(self.fc1(features)))
        return result


class SimClr(nn.Module):
    """Weights depend on the config's seed alone."""

    def __init__(self, config: PretrainConfig, method: SimClrConfig, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.config, self.method = config, method
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.encoder = build_encoder(config.model, config.plan.view, config.plan.token, checkpointing)
            self.projection = Projection(self.encoder.width, method.projection)
            initialise(self.projection)

    def forward(self, batch: TensorBatch) -> Losses:
        """The contrastive loss of a micro-batch, whole groups; the only part."""
        views = self.make_views(batch)
        at_once, of_group = self.config.train.views_at_once, 2 * self.method.group
        size = len(views) if at_once is None else at_once // of_group * of_group
        runs = [lambda part=part: self._parts(part, len(views)) for part in torch.split(views, size)]
        return losses_by_chunk(runs, lambda parts: parts[PART], self, self.config.train)

    def make_views(self, batch: TensorBatch) -> Tensor:
        """The augmented crops [B, 1, Z, Y, X], samples outermost."""
        views = make_views(batch, self.config.plan, self.config.data.window_hu)[0]
        return augment(views, batch.levels[0].draws.flatten(0, 1))

    def project(self, views: Tensor) -> Tensor:
        """What is compared: each view's mean token features, projected [B, P]."""
        tokens = at_least_float32(self.encoder(views))
        projected: Tensor = self.projection(tokens.mean(dim=1))
        return at_least_float32(projected)

    @torch.no_grad()
    def trivial(self, batch: TensorBatch) -> dict[str, Tensor]:
        """What features that are equal for all views reach: the logarithm of the views that one is picked from."""
        return {PART: torch.full((), math.log(2 * self.method.group - 1), device=batch.blocks.device)}

    @torch.no_grad()
    def watch(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Rank and deviation of what is compared; `found`: share of views whose sibling is most alike, and `chance`."""
        projected = self.project(self.make_views(batch))
        groups = F.normalize(projected, dim=-1).view(-1, 2 * self.method.group, projected.shape[1])
        views = groups.shape[1]
        itself = torch.eye(views, dtype=torch.bool, device=groups.device)
        nearest = (groups @ groups.transpose(1, 2)).masked_fill(itself, -math.inf).argmax(dim=-1)
        sibling = torch.arange(views, device=groups.device) ^ 1
        return {
            "rank_projection": effective_rank(projected),
            "deviation_projection": deviation(projected),
            "found_sibling": (nearest == sibling).float().mean(),
            "chance_sibling": torch.full((), 1 / (views - 1), device=groups.device),
        }

    @torch.no_grad()
    def preview(self, batch: TensorBatch) -> SimilarityPreview:
        """The augmented crops, and the cosines of what is compared."""
        views = self.make_views(batch)
        projected = F.normalize(self.project(views), dim=-1)
        return SimilarityPreview(picture(views), (projected @ projected.T).cpu().numpy())

    def _parts(self, views: Tensor, num_views: int) -> dict[str, Tensor]:
        """What some groups add to the mean over the micro-batch."""
        projected = self.project(views)
        # In full precision whatever the network ran in: similarities are divided by a small temperature.
        with torch.autocast(views.device.type, enabled=False):
            groups = projected.view(-1, 2 * self.method.group, projected.shape[1])
            of_views = nt_xent(groups, self.method.temperature)
        return {PART: of_views.sum() / num_views}


def nt_xent(projected: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding a view's sibling among the other views of its group, by cosine over temperature.

    Args:
        projected: [groups, 2 G, P]; siblings are neighbours.

    Returns:
        [groups, 2 G]
    """
    rows = F.normalize(projected, dim=-1)
    views = rows.shape[1]
    itself = torch.eye(views, dtype=torch.bool, device=rows.device)
    logits = (rows @ rows.transpose(1, 2) / temperature).masked_fill(itself, -math.inf)
    sibling = (torch.arange(views, device=rows.device) ^ 1).expand(len(rows), -1)
    return F.cross_entropy(logits.flatten(0, 1), sibling.flatten(), reduction="none").view(-1, views)
