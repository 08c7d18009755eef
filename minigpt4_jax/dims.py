"""The legend of dimension letters, and the array aliases that share them. Nothing here computes.

B batch, T image tokens of one picture, S sequence or cache slots, D width, F mlp width, N query heads, K key/value
heads, H head dim, V vocabulary, L layers, I images, P patches (class token included where said), C vision channels,
Q queries of the Q-Former, E its width, R rows of features or image embeddings (all pictures of a prompt), W beams of a
row, A ids of an answer.
"""

from jax import Array
from jaxtyping import Bool, Float, Int

TokenIds = Int[Array, "B S"]
"""int32 ids; `config.IMAGE_TOKEN_ID` marks the slots that image embeddings are scattered into."""
Images = Float[Array, "I height width 3"]
"""float32, resized to the model's square and normalised by the preset's mean and std."""
Embeds = Float[Array, "B S D"]
Mask = Bool[Array, "B Sq Sk"]
"""True = attend."""

__all__ = ["Embeds", "Images", "Mask", "TokenIds"]
