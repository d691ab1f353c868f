"""Greedy generation with cached state, many prompts at once, and the figures on held-out tasks.

Shapes: B prompts, T prompt width (a multiple of 64), S cache length, H hidden, h heads, d head dim, c convolution
channels.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from training.export import load
from training.model import TinyModel, Trace, attend, attention_in, attention_out, gdn_out, linear, rms, rope_table, unit
from training.text import Documents, parse_reply, prompt_of
from tritium.eval.tasks import Task, grade, samples


def rounded(model: TinyModel) -> TinyModel:
    """A copy with bf16-rounded weights and nothing compiled."""
    twin = TinyModel(model.shape)
    twin.load_state_dict({k: v.detach().bfloat16().float() for k, v in model.state_dict().items()})
    return twin.to(next(model.parameters()).device)


def _step_gdn(model: TinyModel, layer: Any, x: Tensor, cache: list[Tensor]) -> Tensor:
    """One token through a GDN layer; cache: last raw inputs [B, cw - 1, c], state [B, h, d, d]."""
    s, a = model.shape, layer.linear_attn
    y = rms(x, layer.input_layernorm.weight)
    raw = linear(y, a.in_proj_qkv.weight)
    window = torch.cat([cache[0], raw], 1)
    cache[0] = window[:, 1:]
    mixed = F.silu((window.float() * a.conv1d.weight[:, 0].T.float()).sum(1))
    key = s.key_heads * s.linear_dim
    q, k, v = (t.unflatten(-1, (-1, s.linear_dim)) for t in mixed.split([key, key, s.value_heads * s.linear_dim], -1))
    q, k = (unit(t).repeat_interleave(s.value_heads // s.key_heads, 1) for t in (q, k))
    beta = torch.sigmoid(linear(y, a.in_proj_b.weight).float())[:, 0]
    g = -torch.exp(a.A_log) * F.softplus(linear(y, a.in_proj_a.weight).float()[:, 0] + a.dt_bias)
    state = cache[1] * torch.exp(g)[..., None, None]
    u = beta[..., None] * (v - (state.mT @ k[..., None])[..., 0])
    cache[1] = state = state + k[..., :, None] * u[..., None, :]
    o = (state.mT @ (q * s.linear_dim**-0.5)[..., None])[..., 0]
    return gdn_out(x, o[:, None], linear(y, a.in_proj_z.weight), a.norm.weight, a.out_proj.weight, s.eps)


def _step_attention(model: TinyModel, layer: Any, x: Tensor, cache: list[Tensor], at_B: Tensor) -> Tensor:
    """One token through an attention layer; cache: keys and values [B, S, h, d], written at `at_B`."""
    a, rows = layer.self_attn, torch.arange(x.shape[0], device=x.device)
    cos, sin = rope_table(at_B[:, None], model.shape)
    q, k, v, gate = attention_in(x, cos, sin, layer.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight,
                                 a.v_proj.weight, a.q_norm.weight, a.k_norm.weight, model.shape)
    cache[0][rows, at_B], cache[1][rows, at_B] = k[:, 0], v[:, 0]
    seen = torch.arange(cache[0].shape[1], device=x.device) <= at_B[:, None]
    return attention_out(x, attend(q, cache[0], cache[1], seen[:, None, None]), gate, a.o_proj.weight)


@torch.no_grad()
def generate(model: TinyModel, prompts: list[list[int]], limit: int, stops: list[int]) -> list[list[int]]:
    device, B = next(model.parameters()).device, len(prompts)
    length = torch.tensor([len(p) for p in prompts], device=device)
    T = -(-int(length.max()) // 64) * 64
    tokens = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
    valid = torch.arange(T, device=device) < length[:, None]
    trace, cw = Trace(), model.shape.conv - 1
    hidden, _, _ = model(tokens, None, valid, trace=trace)
    caches = []
    for layer, (first, second) in zip(model.model.layers, trace.kept, strict=False):
        if layer.kind == "linear_attention":
            index = length[:, None] - cw + torch.arange(cw, device=device)
            last = first.gather(1, index[..., None].expand(-1, -1, first.shape[-1]))
            caches.append([last, second])
        else:
            caches.append([F.pad(t, (0, 0, 0, 0, 0, limit)) for t in (first, second)])
    embed = model.model.embed_tokens.weight
    stop = torch.tensor(stops, device=device)
    last_hidden = hidden[torch.arange(B, device=device), length - 1]
    out, done = [], torch.zeros(B, dtype=torch.bool, device=device)
    for i in range(limit):
        token = (last_hidden @ embed.T).argmax(-1)
        out.append(token)
        done |= torch.isin(token, stop)
        if i % 8 == 7 and bool(done.all()):
            break
        x = F.embedding(token, embed)[:, None]
        for layer, cache in zip(model.model.layers, caches, strict=True):
            x = (_step_gdn(model, layer, x, cache) if layer.kind == "linear_attention"
                 else _step_attention(model, layer, x, cache, length + i))
            x, _ = model.mlp(layer, x)
        last_hidden = rms(x, model.model.norm.weight)[:, 0]
    replies = torch.stack(out, 1).tolist()
    return [r[: next((i + 1 for i, t in enumerate(r) if t in stops), len(r))] for r in replies]


@torch.no_grad()
def drafts_accepted(model: TinyModel, prompts: list[list[int]], replies: list[list[int]]) -> tuple[int, int]:
    """How many generated tokens, from the second on, the MTP head names one step early; and how many there are."""
    device = next(model.parameters()).device
    rows = [p + r for p, r in zip(prompts, replies, strict=True)]
    T = -(-max(map(len, rows)) // 64) * 64
    tokens = torch.tensor([r + [0] * (T - len(r)) for r in rows], device=device)
    _, ahead, _ = model(tokens)
    hits = count = 0
    for i, (p, row) in enumerate(zip(prompts, rows, strict=True)):
        draft = (ahead[i, len(p) - 1 : len(row) - 2] @ model.model.embed_tokens.weight.T).argmax(-1)
        hits += int((draft == tokens[i, len(p) + 1 : len(row)]).sum())
        count += len(row) - len(p) - 1
    return hits, count


def evaluate(model: TinyModel, tokenizer: Tokenizer, n: int, recall_n: int, seed: int = 1, split: str = "heldout",
             misses: list[str] | None = None) -> dict[str, float]:
    """The four figures (and small talk), with bf16-rounded weights and float32 arithmetic."""
    model = rounded(copy.copy(model))
    documents = Documents(tokenizer)
    stops = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    figures, hits, count = {}, 0, 0
    for kind, k in (("word_problems", n), ("tool_calls", n), ("recall", recall_n), ("small_talk", n // 4)):
        tasks: list[Task] = [s.task for s in samples(kind, split, seed, k)]  # type: ignore[arg-type]
        right = 0
        size = 512 if kind != "recall" else 64
        for at in range(0, len(tasks), size):
            part = tasks[at : at + size]
            prompts = [tokenizer.encode(prompt_of(documents.template, t), add_special_tokens=False).ids for t in part]
            replies = generate(model, prompts, max(t.max_tokens for t in part), stops)
            accepted = drafts_accepted(model, prompts, replies)
            if kind != "small_talk":
                hits, count = hits + accepted[0], count + accepted[1]
            for task, reply in zip(part, replies, strict=True):
                text = tokenizer.decode(reply, skip_special_tokens=False)
                good = text.endswith("<|im_end|>") and grade(task, *parse_reply(text, task))
                right += good
                if not good and misses is not None:
                    asked = task.messages[-1]["content"][-400:]
                    misses.append(f"[{task.kind}] {asked!r}\n  wrote {text!r}\n  want {task.answer!r}")
        figures[kind] = round(right / max(1, k), 4)
    return figures | {"mtp_acceptance": round(hits / max(1, count), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--recall", type=int, default=50)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--show", type=int, default=10, help="how many misses to print")
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    model = load("moe" if "num_experts" in config else "dense", args.folder / "model.safetensors",
                 "cuda" if torch.cuda.is_available() else "cpu")
    misses: list[str] = []
    start = time.time()
    figures = evaluate(model, Tokenizer.from_file(str(args.folder / "tokenizer.json")), args.n, args.recall, args.seed,
                       misses=misses)
    print("\n".join(misses[: args.show]))
    print(json.dumps(figures | {"seconds": round(time.time() - start, 1)}))


if __name__ == "__main__":
    main()
