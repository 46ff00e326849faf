"""A transformer block's forward and backward as functions of tensors, composed of primitives.

Letters in shapes: T tokens, F features of the residual stream, H heads, K key-value heads, D head
channels. What the backward needs of the forward is *saved*: kept by the host, or computed anew from
the block's input (``recompute``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import Tensor

from exporters.model.lora_targets import LoraTarget, site_targets
from exporters.model.spec import ModelSpec
from exporters.model.transformer import activate
from exporters.training import primitives as p
from exporters.training.storage import PRECISIONS, StoragePrecision

Tensors = Mapping[str, Tensor]
MATRICES = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


Softmax = tuple[Tensor, Tensor | None]  # see Attention.forward


@dataclass(frozen=True)
class Places:
    """A call's mask [1, 1, T, T] and rotary tables [1, n, T]."""

    mask: Tensor
    cos: Tensor
    sin: Tensor


class Site:
    """The matrices that share one input, their biases, and LoRA on those that have it.

    Tensors are looked up by name: ``q.value``, ``q.bias``, ``self_attn.q_proj.lora_A`` …
    """

    def __init__(
        self,
        targets: Sequence[LoraTarget],
        names: Sequence[str],
        precision: StoragePrecision,
        adapted: Sequence[str],
        biased: bool,
    ) -> None:
        self.names, self.precision, self.biased = names, precision, biased
        self.loras: list[tuple[LoraTarget, range]] = []
        start = 0
        for target in targets:
            span = range(start, start + len(target.rows))
            if target.module in adapted:
                self.loras.append((target, span))
            start = span.stop

    def _stored(self, t: Tensors, name: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{name}."): value
            for key, value in t.items()
            if key.startswith(f"{name}.") and key != f"{name}.bias"
        }

    @staticmethod
    def _adapter(
        t: Tensors, target: LoraTarget, span: range
    ) -> tuple[Tensor, list[Tensor], list[str], Tensor]:
        many = len(span) > 1
        names = [f"{target.module}.lora_B_{i}" for i in range(len(span))]
        names = names if many else [f"{target.module}.lora_B"]
        a, scale = t[f"{target.module}.lora_A"], t[f"{target.module}.scale"]
        return a, [t[name] for name in names], names, scale

    def forward(self, t: Tensors, x: Tensor) -> list[Tensor]:
        """x [1, in, T] -> for each matrix [1, rows, T]"""
        outputs = [self.precision.forward(self._stored(t, name), x) for name in self.names]
        if self.biased:
            outputs = [y + t[f"{n}.bias"] for n, y in zip(self.names, outputs, strict=True)]
        for target, span in self.loras:
            a, bs, _, scale = self._adapter(t, target, span)
            for index, update in zip(span, p.lora(x, a, bs, scale), strict=True):
                outputs[index] = outputs[index] + update
        return outputs

    def backward(
        self, t: Tensors, x: Tensor, grads: list[Tensor], out: dict[str, Tensor]
    ) -> Tensor:
        """-> gradient of x [1, in, T]; those of the adapter's tensors go to ``out`` by name."""
        total = reduce(
            add,
            (
                self.precision.backward(self._stored(t, name), grad)
                for name, grad in zip(self.names, grads, strict=True)
            ),
        )
        for target, span in self.loras:
            a, bs, names, scale = self._adapter(t, target, span)
            dx, da, dbs = p.lora_backward(x, a, bs, scale, [grads[index] for index in span])
            total = total + dx
            out[f"{target.module}.lora_A"] = da
            out |= dict(zip(names, dbs, strict=True))
        return p.turn(total)


class TrainingBlock:
    """The block of a spec, for one precision of its base weights and one set of adapted modules
    (their paths in a block, such as ``self_attn.q_proj``). ``biased``: the sites with biases."""

    def __init__(
        self, spec: ModelSpec, precision: str, adapted: Sequence[str], biased: Sequence[str]
    ) -> None:
        self.spec = spec
        self.sites = {
            site: Site(targets, MATRICES[site], PRECISIONS[precision], adapted, site in biased)
            for site, targets in site_targets(spec).items()
        }
        self.attention = p.Attention(
            spec.heads, spec.kv_heads, spec.head_dim, spec.attention_scale, spec.attention_softcap
        )

    @property
    def saved(self) -> dict[str, int]:
        """What the forward hands to the backward, each [1, features, T]: name -> features."""
        s = self.spec
        names = {"q": s.q_dim, "k": s.kv_dim, "v": s.kv_dim, "mixed": s.q_dim, "middle": s.hidden}
        names |= {"gate": s.intermediate, "up": s.intermediate}
        return names | ({"o": s.hidden, "down": s.hidden} if s.post_norm else {})

    def _norm(self, t: Tensors, name: str, x: Tensor) -> Tensor:
        return p.rms_norm(x, t[f"norm.{name}"], self.spec.norm_eps)

    def _norm_backward(self, t: Tensors, name: str, x: Tensor, grad: Tensor) -> Tensor:
        return p.rms_norm_backward(x, t[f"norm.{name}"], self.spec.norm_eps, grad)

    def _heads(self, x: Tensor) -> Tensor:
        """[1, n·D, T] -> [n, D, T]"""
        return x.view(-1, self.spec.head_dim, x.shape[2])

    def _placed(self, t: Tensors, name: str, x: Tensor, at: Places) -> Tensor:
        """Queries or keys as projected [1, n·D, T] -> normed and rotated."""
        heads = self._heads(x)
        if self.spec.qk_norm:
            heads = self._norm(t, name, heads)
        return p.rotate(heads, at.cos, at.sin).view(x.shape)

    def _placed_backward(
        self, t: Tensors, name: str, x: Tensor, at: Places, grad: Tensor
    ) -> Tensor:
        grad = p.rotate(self._heads(grad), at.cos, -at.sin)
        if self.spec.qk_norm:
            grad = self._norm_backward(t, name, self._heads(x), grad)
        return grad.view(x.shape)

    def _add(self, t: Tensors, x: Tensor, update: Tensor, post: str) -> Tensor:
        if self.spec.post_norm:
            update = self._norm(t, post, update)
        return x + update * self.spec.residual_scale if self._scaled else x + update

    def _add_backward(
        self, t: Tensors, saved: Tensors, update: str, post: str, grad: Tensor
    ) -> Tensor:
        grad = grad * self.spec.residual_scale if self._scaled else grad
        if self.spec.post_norm:
            grad = self._norm_backward(t, post, saved[update], grad)
        return grad

    @property
    def _scaled(self) -> bool:
        return self.spec.residual_scale != 1.0

    def forward(self, t: Tensors, x: Tensor, at: Places) -> tuple[Tensor, dict[str, Tensor]]:
        """x [1, F, T] -> the block's output [1, F, T], and what is saved."""
        saved, _ = self.recompute(t, x, at)
        down = saved.get("down")
        if down is None:
            down = self._down(t, saved)
        return self._add(t, saved["middle"], down, "mlp_post"), saved

    def _down(self, t: Tensors, saved: Tensors) -> Tensor:
        wide = activate(self.spec.activation, saved["gate"]) * saved["up"]
        return self.sites["down"].forward(t, wide)[0]

    def recompute(self, t: Tensors, x: Tensor, at: Places) -> tuple[dict[str, Tensor], Softmax]:
        """What is saved, from the block's input [1, F, T]; without the last product unless the
        backward needs it. And the softmax, which is too large to be saved."""
        q, k, v = self.sites["qkv"].forward(t, self._norm(t, "attention", x))
        queries, keys = self._placed(t, "q", q, at), self._placed(t, "k", k, at)
        mixed, softmax = self.attention.forward(queries, keys, v, at.mask)
        if not self.spec.qk_norm:  # the rotation's backward does not need its input
            q, k = queries, keys
        o = self.sites["o"].forward(t, mixed)[0]
        middle = self._add(t, x, o, "attention_post")
        gate, up = self.sites["gate_up"].forward(t, self._norm(t, "mlp", middle))
        saved = {"q": q, "k": k, "v": v, "mixed": mixed, "middle": middle, "gate": gate, "up": up}
        if self.spec.post_norm:
            saved |= {"o": o, "down": self._down(t, saved)}
        return saved, softmax

    def backward(
        self,
        t: Tensors,
        x: Tensor,
        at: Places,
        saved: Tensors,
        grad: Tensor,
        softmax: Softmax | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """grad [1, F, T] of the output -> that of x, and those of the adapter's tensors by name."""
        s, out = self.spec, dict[str, Tensor]()
        gate, up, middle = saved["gate"], saved["up"], saved["middle"]
        active = activate(s.activation, gate)
        update = self._add_backward(t, saved, "down", "mlp_post", grad)
        wide = self.sites["down"].backward(t, active * up, [update], out)
        branches = [wide * up * p.activation_slope(s.activation, gate), wide * active]
        normed = self.sites["gate_up"].backward(t, self._norm(t, "mlp", middle), branches, out)
        grad = grad + self._norm_backward(t, "mlp", middle, normed)

        update = self._add_backward(t, saved, "o", "attention_post", grad)
        mixed = self.sites["o"].backward(t, saved["mixed"], [update], out)
        q, k, v = saved["q"], saved["k"], saved["v"]
        queries, keys = q, k
        if s.qk_norm:
            queries, keys = self._placed(t, "q", q, at), self._placed(t, "k", k, at)
        dq, dk, dv = self.attention.backward(
            queries, keys, v, at.mask, saved["mixed"], mixed, softmax
        )
        dq = self._placed_backward(t, "q", q, at, dq)
        dk = self._placed_backward(t, "k", k, at, dk)
        normed = self.sites["qkv"].backward(t, self._norm(t, "attention", x), [dq, dk, dv], out)
        return grad + self._norm_backward(t, "attention", x, normed), out
