"""Which tensors `--quantize` takes. Names are those of checkpoints, whatever Tritium fuses.

Only matrices that tokens are multiplied by can be quantized. Of these stay as they are, unless asked for by
`--quantize-also`: the head, the router and the shared expert's gate, GDN's write strengths and decays, and what joins
embedding and hidden state before the MTP layer; under int8 also GDN's other input projections, which are known to
suffer from activations in 8 bits of one scale a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from tritium.core.errors import ConfigError

_KEPT = ("lm_head.weight", "*.mlp.gate.weight", "*.shared_expert_gate.weight", "*.in_proj_a.weight",
         "*.in_proj_b.weight", "mtp.fc.weight")
_KEPT_BY = {"int8": ("*.in_proj_qkv.weight", "*.in_proj_z.weight")}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def pattern(name: str) -> str:
    """A tensor's name with a star for the number of its layer and expert."""
    return _NUMBER.sub("*", name)


def select(scheme: str, keep: Sequence[str], also: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """The tensors that are quantized, with their scheme. `names`: of every matrix that could be, its canonical name
    and the checkpoint's. A glob may match either; `keep` goes before `also`. Raises `ConfigError` for a glob that
    matches none of them."""

    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(name, glob) or fnmatchcase(names[name], glob) for glob in globs)

    for flag, globs in (("--keep-bf16", keep), ("--quantize-also", also)):
        for glob in globs:
            if not any(matches(name, [glob]) for name in names):
                known = sorted({pattern(name) for name in names.values()})
                near = get_close_matches(glob, known, n=4, cutoff=0.2) or known[:4]
                raise ConfigError(
                    f"{flag} {glob} matches no tensor that can be quantized (embeddings, a head tied to them, norms "
                    "and convolution cannot)", hint=f"near: {', '.join(near)}"
                )
    stay = (*_KEPT, *_KEPT_BY.get(scheme, ()))
    return {
        name: scheme for name in names
        if not matches(name, keep) and (matches(name, also) or not any(fnmatchcase(name, glob) for glob in stay))
    }  # fmt: skip
