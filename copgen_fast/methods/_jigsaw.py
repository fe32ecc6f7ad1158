"""InfoMin's jigsaw branch: an embedding of nine shuffled pieces of an anchor, compared as another view of it."""

from __future__ import annotations

from torch import Tensor, nn

from copgen_fast.augmentations import CELLS, jigsaw_pieces
from copgen_fast.encoders import Encoder, projection_head


class Jigsaw(nn.Module):
    """Embeddings [N, 128] of jigsaw views: each piece through encoder and head, and all nine through one layer."""

    def __init__(self, feature_dim: int) -> None:
        super().__init__()
        self.head = projection_head(feature_dim)
        dim = self.head[-1].out_features
        self.join = nn.Linear(CELLS**2 * dim, dim)

    def forward(self, encoder: Encoder, views: Tensor) -> Tensor:
        return self.join(self.head(encoder(jigsaw_pieces(views))).unflatten(0, (len(views), -1)).flatten(1))
