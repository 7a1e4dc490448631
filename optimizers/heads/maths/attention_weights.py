"""The weights of one attention with their axes apart, so that heads and what they compute in are plain array axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxpress.arrays import Doubles, Indices


@dataclass(frozen=True)
class AttentionWeights:
    """y = Σ_h attention_h(x · query_h, x · key_g, x · value_g) · output_h + offset.

    Query heads come in equal runs: those of one key/value head are neighbours. Biases are the last rows of query, key
    and value, as if x ended in a 1, so that whatever is done to a head is done to its bias.
    """

    query: Doubles
    """[hidden + 1, heads, head_dim]"""
    key: Doubles
    """[hidden + 1, kv_heads, head_dim]"""
    value: Doubles
    """[hidden + 1, kv_heads, head_dim]"""
    output: Doubles
    """[heads, head_dim, hidden]"""
    offset: Doubles
    """[hidden]"""

    @property
    def heads(self) -> int:
        return int(self.output.shape[0])

    @property
    def kv_heads(self) -> int:
        return int(self.value.shape[1])

    @property
    def head_dim(self) -> int:
        return int(self.output.shape[1])

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.head_dim

    @property
    def group(self) -> int:
        """Query heads of each key/value head."""
        return self.heads // self.kv_heads

    def keep(self, heads: Indices) -> AttentionWeights:
        """These query heads, in this order, and the key/value heads that they use.

        Raises ValueError unless each key/value head that is used at all keeps as many query heads, side by side.
        """
        groups = np.asarray(heads) // self.group
        used = list(dict.fromkeys(groups.tolist()))
        if len(heads) % len(used) or (np.repeat(used, len(heads) // len(used)) != groups).any():
            raise ValueError(f"heads {list(heads)} leave groups of {self.group} unequal")
        return replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, used],
            value=self.value[:, used],
            output=self.output[heads],
        )

    def map_values(self, inward: Doubles, outward: Doubles) -> AttentionWeights:
        """value_g · inward_g and outward_g · output_h: [kv_heads, head_dim, new] and [kv_heads, new, head_dim]."""
        return replace(
            self,
            value=np.einsum("igd,gde->ige", self.value, inward),
            output=np.einsum("hed,hdo->heo", np.repeat(outward, self.group, axis=0), self.output),
        )

    def map_scores(self, queries: Doubles, keys: Doubles) -> AttentionWeights:
        """query_h · queries_g and key_g · keys_g, both maps [kv_heads, head_dim, new]."""
        return replace(
            self,
            query=np.einsum("ihd,hde->ihe", self.query, np.repeat(queries, self.group, axis=0)),
            key=np.einsum("igd,gde->ige", self.key, keys),
        )
