"""The Qwen3.5 architecture in plain PyTorch, for training and for checking what was trained.

Parameter names are the checkpoint's, so that `state_dict()` is the file. Mixers and MLPs are functions of tensors, so
that each is compiled once per shape and not once per layer.

Shapes: B rows, T positions, H hidden, V vocabulary, h heads, d head dim, k chunks per row, C chunk length, E experts,
I intermediate; M = B * h matrices. Suffixes on names say the shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 64
FORGET = -60.0  # log decay at the first token of a document: nothing of the one before survives


@dataclass(frozen=True)
class Shape:
    """What config.json says about the network."""

    vocab: int = 1536
    hidden: int = 256
    layer_types: tuple[str, ...] = (("linear_attention",) * 3 + ("full_attention",)) * 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 16
    theta: float = 1e7
    key_heads: int = 4
    value_heads: int = 4
    linear_dim: int = 64
    conv: int = 4
    intermediate: int = 384
    experts: int = 0  # 0: dense
    top_k: int = 2
    expert_width: int = 32
    shared_width: int = 128
    eps: float = 1e-6

    @property
    def conv_channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.linear_dim


SHAPES = {"dense": Shape(), "moe": Shape(experts=8)}


def linear(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.to(x.dtype))


def rms(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm with a zero-centred weight, in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (1.0 + w.float())).to(x.dtype)


class _UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower A [..., C, C]."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a + eye, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        t = inverse.mT
        return -(t @ grad @ t)


class _Scan(torch.autograd.Function):
    """The recurrence over chunks. Per chunk: v = u - w S; S <- a S + k^T v. Returns v and the state before each chunk.

    w, u, k: [n, M, C, d]; a: [n, M, 1, 1]; the outputs: v [n, M, C, d], S [n + 1, M, d, d].
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, k: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        n, m, _, d = w.shape
        v = torch.empty_like(u)
        states = torch.zeros(n + 1, m, d, u.shape[-1], dtype=u.dtype, device=u.device)
        for i in range(n):
            torch.baddbmm(u[i], w[i], states[i], alpha=-1, out=v[i])
            torch.baddbmm(states[i] * a[i], k[i].mT, v[i], out=states[i + 1])
        ctx.save_for_backward(w, k, a, v, states)
        return v, states

    @staticmethod
    def backward(ctx: Any, dv_in: Tensor, ds_in: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, k, a, v, states = ctx.saved_tensors
        n = w.shape[0]
        dv, after = torch.empty_like(v), torch.empty_like(states)  # after[i]: gradient of the state before chunk i
        after[n].copy_(ds_in[n])
        for i in reversed(range(n)):
            torch.baddbmm(dv_in[i], k[i], after[i + 1], out=dv[i])
            torch.baddbmm(torch.addcmul(ds_in[i], after[i + 1], a[i]), w[i].mT, dv[i], alpha=-1, out=after[i])
        dw = -(dv @ states[:n].mT)
        dk = v @ after[1:].mT
        da = (states[:n] * after[1:]).sum((-1, -2), keepdim=True)
        return dw, dv, dk, da


def gdn_in(
    x_BTH: Tensor, doc_BT: Tensor, valid_BT: Tensor, norm: Tensor, qkv_w: Tensor, z_w: Tensor, b_w: Tensor, a_w: Tensor,
    conv_w: Tensor, A_log: Tensor, dt_bias: Tensor, shape: Shape,
) -> tuple[Tensor, ...]:
    """Everything before the scan: projections, convolution, gates, and the per-chunk matrices [k, M, C, ...]."""
    T = x_BTH.shape[1]
    hv, d = shape.value_heads, shape.linear_dim
    y = rms(x_BTH, norm)
    raw, z = linear(y, qkv_w), linear(y, z_w)
    beta = torch.sigmoid(linear(y, b_w).float()) * valid_BT[..., None]
    g = -torch.exp(A_log.float()) * F.softplus(linear(y, a_w).float() + dt_bias.float())
    start_BT = doc_BT != F.pad(doc_BT, (1, 0), value=-1)[:, :-1]
    g = torch.where(start_BT[..., None], FORGET, g) * valid_BT[..., None]

    mixed = raw.float() * conv_w[:, 0, -1].float()
    for back in range(1, shape.conv):
        same = doc_BT == F.pad(doc_BT, (back, 0), value=-1)[:, :-back]
        moved = F.pad(raw, (0, 0, back, 0))[:, :-back]
        mixed = mixed + (moved * same[..., None]).float() * conv_w[:, 0, -1 - back].float()
    mixed = F.silu(mixed)

    key = shape.key_heads * d
    q, k, v = mixed.split([key, key, hv * d], -1)
    q, k = (unit(t.unflatten(-1, (-1, d))).repeat_interleave(hv // shape.key_heads, 2) for t in (q, k))
    v = v.unflatten(-1, (-1, d))

    def chunks(t: Tensor) -> Tensor:  # [B, T, h, ...] -> [k, B * h, C, ...]
        t = t.unflatten(1, (T // CHUNK, CHUNK))
        return t.movedim(1, 0).movedim(3, 2).flatten(1, 2)

    q, k, v, g, beta = chunks(q * d**-0.5), chunks(k), chunks(v), chunks(g), chunks(beta)
    total = g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).tril()
    decay = torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~lower, -torch.inf))
    system = ((k * beta[..., None]) @ k.mT * decay).tril(-1)
    inside = (q @ k.mT) * decay
    grow = torch.exp(total)[..., None]
    wk, uv = k * beta[..., None] * grow, v * beta[..., None]
    last = total[..., -1:]
    return raw, z, system, wk, uv, inside, q * grow, k * torch.exp(last - total)[..., None], torch.exp(last)[..., None]


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gdn_out(x_BTH: Tensor, o: Tensor, z_BTD: Tensor, norm: Tensor, out_w: Tensor, eps: float) -> Tensor:
    """Gated norm, output projection, residual; o: [B, T, h, d] float32."""
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * norm.float()
    o = o * F.silu(z_BTD.float().unflatten(-1, o.shape[-2:]))
    return x_BTH + linear(o.flatten(-2).to(x_BTH.dtype), out_w)


def gdn_read(o_in: Tensor, inside: Tensor, v: Tensor, states: Tensor, B: int) -> Tensor:
    """What the queries read, back in [B, T, h, d]."""
    o = o_in @ states[:-1] + inside @ v
    n, m, c, d = o.shape
    return o.view(n, B, m // B, c, d).permute(1, 0, 3, 2, 4).reshape(B, n * c, m // B, d)


def rope_table(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin of [..., rotary]."""
    even = torch.arange(0, shape.rotary, 2, device=positions.device, dtype=torch.float32)
    frequency = shape.theta ** (-even / shape.rotary)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x_BThd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = cos.shape[-1]
    turned, kept = x_BThd[..., :r].float(), x_BThd[..., r:]
    half = torch.cat([-turned[..., r // 2 :], turned[..., : r // 2]], -1)
    return torch.cat([(turned * cos[..., None, :] + half * sin[..., None, :]).to(x_BThd.dtype), kept], -1)


def attention_in(
    x_BTH: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, q_w: Tensor, k_w: Tensor, v_w: Tensor, qn: Tensor,
    kn: Tensor, shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotated queries [B, T, nq, d], keys, values [B, T, nkv, d], gate [B, T, nq * d]."""
    d = shape.head_dim
    y = rms(x_BTH, norm)
    q, gate = linear(y, q_w).unflatten(-1, (shape.heads, 2 * d)).chunk(2, -1)
    k, v = (linear(y, w).unflatten(-1, (shape.kv_heads, d)) for w in (k_w, v_w))
    return rotate(rms(q, qn), cos, sin), rotate(rms(k, kn), cos, sin), v, gate.flatten(-2)


def attend(q_BThd: Tensor, k_BShd: Tensor, v_BShd: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; without a mask it is causal. Returns [B, T, nq * d]."""
    groups = q_BThd.shape[2] // k_BShd.shape[2]
    k_BShd, v_BShd = (t.repeat_interleave(groups, 2) for t in (k_BShd, v_BShd))
    q, k, v = (t.transpose(1, 2) for t in (q_BThd, k_BShd, v_BShd))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return o.transpose(1, 2).flatten(-2)


def attention_out(x_BTH: Tensor, o: Tensor, gate: Tensor, out_w: Tensor) -> Tensor:
    return x_BTH + linear(o * torch.sigmoid(gate), out_w)


def dense_mlp(x_BTH: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = rms(x_BTH, norm)
    return x_BTH + linear(F.silu(linear(y, gate)) * linear(y, up), down)


def moe_mlp(
    x_BTH: Tensor, norm: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, shared_gate: Tensor, s_gate: Tensor,
    s_up: Tensor, s_down: Tensor, top_k: int,
) -> tuple[Tensor, Tensor]:
    """All experts are computed and the unchosen ones weighted by zero, which at this width is as fast as sorting.

    Returns the block's output and the load-balancing loss (1 when balanced)."""
    y = rms(x_BTH, norm)
    probs = torch.softmax(linear(y, router).float(), -1)  # [B, T, E]
    top, index = torch.topk(probs, top_k, dim=-1)
    chosen = torch.zeros_like(probs).scatter(-1, index, 1.0)
    weights = probs * chosen / top.sum(-1, keepdim=True)
    E, width, _ = gate_up.shape
    gu = linear(y, gate_up.flatten(0, 1)).unflatten(-1, (E, width))
    gate, up = gu.chunk(2, -1)  # [B, T, E, Im]
    act = (F.silu(gate) * up * weights[..., None].to(y.dtype)).flatten(-2)
    routed = linear(act, down.transpose(0, 1).flatten(1))
    shared = linear(F.silu(linear(y, s_gate)) * linear(y, s_up), s_down)
    out = x_BTH + routed + torch.sigmoid(linear(y, shared_gate)) * shared
    balance = E * (chosen.mean((0, 1)) / top_k * probs.mean((0, 1))).sum()
    return out, balance


def weighted_loss(h_BTH: Tensor, embed: Tensor, target_BT: Tensor, weight_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy averaged with the weights, and the share of weight-1 targets whose argmax is right."""
    logits = linear(h_BTH, embed).float()
    loss = F.cross_entropy(logits.flatten(0, 1), target_BT.flatten(), reduction="none")
    weight = weight_BT.flatten()
    hit = (logits.argmax(-1) == target_BT).flatten()
    full = (weight == 1).float()
    return (loss * weight).sum() / weight.sum().clamp_min(1.0), (hit * full).sum() / full.sum().clamp_min(1.0)


class _Weight(nn.Module):
    """A parameter called `weight`, as the checkpoint names it."""

    def __init__(self, *size: int, std: float = 0.0, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*size) * std if std else torch.full(size, value))


class LinearAttention(nn.Module):
    def __init__(self, s: Shape, std: float) -> None:
        super().__init__()
        value = s.value_heads * s.linear_dim
        self.in_proj_qkv = _Weight(s.conv_channels, s.hidden, std=std)
        self.in_proj_z = _Weight(value, s.hidden, std=std)
        self.in_proj_b = _Weight(s.value_heads, s.hidden, std=std)
        self.in_proj_a = _Weight(s.value_heads, s.hidden, std=std)
        self.conv1d = _Weight(s.conv_channels, 1, s.conv, std=s.conv**-0.5)
        self.A_log = nn.Parameter(torch.linspace(0.0, math.log(8.0), s.value_heads))
        dt = torch.logspace(-3, -1, s.value_heads)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = _Weight(s.linear_dim, value=1.0)
        self.out_proj = _Weight(s.hidden, value, std=std / math.sqrt(2 * len(s.layer_types)))


class SelfAttention(nn.Module):
    def __init__(self, s: Shape, std: float) -> None:
        super().__init__()
        self.q_proj = _Weight(s.heads * 2 * s.head_dim, s.hidden, std=std)
        self.k_proj = _Weight(s.kv_heads * s.head_dim, s.hidden, std=std)
        self.v_proj = _Weight(s.kv_heads * s.head_dim, s.hidden, std=std)
        self.o_proj = _Weight(s.hidden, s.heads * s.head_dim, std=std / math.sqrt(2 * len(s.layer_types)))
        self.q_norm = _Weight(s.head_dim)
        self.k_norm = _Weight(s.head_dim)


class MLP(nn.Module):
    def __init__(self, s: Shape, width: int, std: float) -> None:
        super().__init__()
        self.gate_proj = _Weight(width, s.hidden, std=std)
        self.up_proj = _Weight(width, s.hidden, std=std)
        self.down_proj = _Weight(s.hidden, width, std=std / math.sqrt(2 * len(s.layer_types)))


class Experts(nn.Module):
    def __init__(self, s: Shape, std: float) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(s.experts, 2 * s.expert_width, s.hidden) * std)
        down_std = std / math.sqrt(2 * len(s.layer_types))
        self.down_proj = nn.Parameter(torch.randn(s.experts, s.hidden, s.expert_width) * down_std)


class MoE(nn.Module):
    def __init__(self, s: Shape, std: float) -> None:
        super().__init__()
        self.gate = _Weight(s.experts, s.hidden, std=std)
        self.experts = Experts(s, std)
        self.shared_expert = MLP(s, s.shared_width, std)
        self.shared_expert_gate = _Weight(1, s.hidden, std=std)


class Layer(nn.Module):
    def __init__(self, s: Shape, kind: str) -> None:
        super().__init__()
        std = s.hidden**-0.5
        self.kind = kind
        self.input_layernorm = _Weight(s.hidden)
        if kind == "linear_attention":
            self.linear_attn = LinearAttention(s, std)
        else:
            self.self_attn = SelfAttention(s, std)
        self.post_attention_layernorm = _Weight(s.hidden)
        self.mlp: MoE | MLP = MoE(s, std) if s.experts else MLP(s, s.intermediate, std)


class Decoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = _Weight(s.vocab, s.hidden, std=0.04)
        self.layers = nn.ModuleList(Layer(s, kind) for kind in s.layer_types)
        self.norm = _Weight(s.hidden)


class Mtp(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.fc = _Weight(s.hidden, 2 * s.hidden, std=(2 * s.hidden) ** -0.5)
        self.pre_fc_norm_embedding = _Weight(s.hidden)
        self.pre_fc_norm_hidden = _Weight(s.hidden)
        self.layers = nn.ModuleList([Layer(s, "full_attention")])
        self.norm = _Weight(s.hidden)


@dataclass
class Trace:
    """Caches that a forward pass leaves for decoding, layer by layer, the MTP layer last."""

    kept: list[tuple[Tensor, ...]] = field(default_factory=list)


class TinyModel(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.mtp = Mtp(shape)
        self.pieces: dict[str, Callable[..., Any]] = {f.__name__: f for f in (
            gdn_in, gdn_out, gdn_read, attention_in, attention_out, dense_mlp, moe_mlp, weighted_loss, rms)}

    def compile_pieces(self) -> None:
        self.pieces = {name: torch.compile(f, dynamic=False) for name, f in self.pieces.items()}

    def block(self, layer: Any, x: Tensor, doc: Tensor, valid: Tensor, mask: Tensor | None, rope: tuple[Tensor, Tensor],
              trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        s, call = self.shape, self.pieces
        norm = layer.input_layernorm.weight
        if layer.kind == "linear_attention":
            a = layer.linear_attn
            raw, z, system, wk, uv, inside, q, k, keep = call["gdn_in"](
                x, doc, valid, norm, a.in_proj_qkv.weight, a.in_proj_z.weight, a.in_proj_b.weight, a.in_proj_a.weight,
                a.conv1d.weight, a.A_log, a.dt_bias, s)
            inverse = _UnitLowerInverse.apply(system)
            v, states = _Scan.apply(inverse @ wk, inverse @ uv, k.contiguous(), keep)
            o = call["gdn_read"](q, inside, v, states, x.shape[0])
            x = call["gdn_out"](x, o, z, a.norm.weight, a.out_proj.weight, s.eps)
            if trace:
                trace.kept.append((raw, states[-1].unflatten(0, (x.shape[0], -1))))
        else:
            a = layer.self_attn
            q, k, v, gate = call["attention_in"](x, *rope, norm, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight,
                                                 a.q_norm.weight, a.k_norm.weight, s)
            x = call["attention_out"](x, attend(q, k, v, mask), gate, a.o_proj.weight)
            if trace:
                trace.kept.append((k, v))
        return self.mlp(layer, x)

    def mlp(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        m, norm = layer.mlp, layer.post_attention_layernorm.weight
        if not self.shape.experts:
            x = self.pieces["dense_mlp"](x, norm, m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight)
            return x, x.new_zeros(())
        e = m.shared_expert
        return self.pieces["moe_mlp"](x, norm, m.gate.weight, m.experts.gate_up_proj, m.experts.down_proj,
                                      m.shared_expert_gate.weight, e.gate_proj.weight, e.up_proj.weight,
                                      e.down_proj.weight, self.shape.top_k)

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(tokens, self.model.embed_tokens.weight).to(dtype)

    def mtp_in(self, hidden: Tensor, following: Tensor) -> Tensor:
        m = self.mtp
        e = rms(self.embed(following, hidden.dtype), m.pre_fc_norm_embedding.weight)
        return linear(torch.cat([e, rms(hidden, m.pre_fc_norm_hidden.weight)], -1), m.fc.weight)

    def forward(self, tokens_BT: Tensor, doc_BT: Tensor | None = None, valid_BT: Tensor | None = None,
                dtype: torch.dtype = torch.float32, trace: Trace | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Final hidden states [B, T, H], the MTP head's [B, T, H], and the balance loss.

        `doc_BT` numbers the documents of a row (None: one, and attention is plainly causal); T is a multiple of 64."""
        B, T = tokens_BT.shape
        mask = None
        if doc_BT is None:
            doc_BT = torch.zeros_like(tokens_BT)
        else:
            mask = (doc_BT[:, None, :, None] == doc_BT[:, None, None, :]).tril()
        valid = torch.ones(B, T, device=tokens_BT.device) if valid_BT is None else valid_BT.float()
        rope = rope_table(torch.arange(T, device=tokens_BT.device), self.shape)
        x, balance = self.embed(tokens_BT, dtype), torch.zeros((), device=tokens_BT.device)
        for layer in self.model.layers:
            x, extra = self.block(layer, x, doc_BT, valid, mask, rope, trace)
            balance = balance + extra.float()
        hidden = rms(x, self.model.norm.weight)
        y = self.mtp_in(hidden, F.pad(tokens_BT, (0, 1))[:, 1:])
        y, extra = self.block(self.mtp.layers[0], y, doc_BT, valid, mask, rope, trace)
        return hidden, rms(y, self.mtp.norm.weight), (balance + extra.float()) / (len(self.shape.layer_types) + 1)

    def losses(self, tokens_BT: Tensor, doc_BT: Tensor, weight_BT: Tensor, one_document: bool,
               dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Main loss and accuracy, MTP loss and accuracy, balance. Position t of the MTP head predicts token t + 2."""
        hidden, ahead, balance = self(tokens_BT, None if one_document else doc_BT, None, dtype)
        embed, loss = self.model.embed_tokens.weight, self.pieces["weighted_loss"]

        def shifted(by: int) -> tuple[Tensor, Tensor]:
            move = [F.pad(t, (0, by))[:, by:] for t in (tokens_BT, weight_BT)]
            same = F.pad(doc_BT, (0, by), value=-1)[:, by:] == doc_BT
            return move[0], move[1] * same

        main, right = loss(hidden, embed, *shifted(1))
        second, right_ahead = loss(ahead, embed, *shifted(2))
        return main, right, second, right_ahead, balance
