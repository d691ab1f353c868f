"""Flags that commands share: the engine's, from one table over `EngineConfig`, and the sampler's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import click

from tritium.config import DTYPES, LOAD_FORMATS, SCHEMES, TOOL_CALL_PARSERS, EngineConfig, flag
from tritium.core import ConfigError

Command = TypeVar("Command", bound=Callable[..., Any])

ENGINE_FLAGS: dict[str, tuple[Any, str]] = {
    "revision": (str, "Branch, tag or commit of a hub model."),
    "download_dir": (str, "Where hub models are kept, instead of Hugging Face's cache."),
    "tokenizer": (str, "Directory of the tokenizer and template, when it is not the model's."),
    "tool_call_parser": (click.Choice(TOOL_CALL_PARSERS), "How tool calls are read; auto: by the chat template."),
    "dtype": (click.Choice(DTYPES), "Compute dtype; auto: the checkpoint's on a GPU, float32 on a CPU."),
    "device": (str, "auto, cpu, cuda or cuda:N (AMD GPUs too)."),
    "max_model_len": (int, "Longest prompt + output in tokens; default: the checkpoint's limit, or what fits."),
    "max_num_seqs": (int, "Requests that run at once."),
    "max_num_batched_tokens": (int, "Tokens in a step, decode first, then prefill chunks; default: 8192 (CPU: 512)."),
    "gpu_memory_utilization": (float, "Share of the device's memory (on a CPU: of free memory) that may be used."),
    "kv_cache_memory_bytes": (int, "Bytes of the KV pool; default: what is left, as far as it can be used."),
    "num_gpu_blocks_override": (int, "Pages (64 tokens each) of the KV pool."),
    "speculate": (str, "Drafts: none, auto (as deep as pays), mtp:K, ngram:K, or mtp:K,ngram:K (K from 1 to 8). "
                       "Changes no token."),
    "benchmark_force_acceptance": (float, "For benchmarks only: accept drafts at this rate; the answers are wrong."),
    "enable_prefix_caching": (bool, "Keep what requests computed for those that begin alike."),
    "num_checkpoints": (int, "Recurrent states that the prefix cache keeps; default: a share of the memory."),
    "swap_space": (float, "GiB of host memory for states evicted from a GPU; default: 4, none where memory is shared."),
    "cache_dir": (str, "Directory of prefix cache files: one is read at the start and written at the end."),
    "enforce_eager": (bool, "No captured graphs."),
    "async_scheduling": (bool, "Plan decode steps one ahead; default: where the device runs from graphs."),
    "load_format": (click.Choice(LOAD_FORMATS), "Format of the weights; dummy: random ones, for benchmarks."),
    "quantize": (click.Choice(SCHEMES), "Weights in fewer bits, made at load; default: as the checkpoint has them."),
    "keep_bf16": (str, "With --quantize: glob on the checkpoint's tensor names that stay as they are; again for more."),
    "quantize_also": (str, "With --quantize: glob of tensors that it would leave, as lm_head.weight; again for more."),
    "seed": (int, "Seed from which requests without one draw theirs; default: from the operating system."),
    "num_threads": (int, "CPU threads; default: torch's choice."),
}
"""Field of `EngineConfig`: type and help. The flag's name and default are the field's."""


def engine_flags(command: Command) -> Command:
    """Adds `--model`, every flag of `ENGINE_FLAGS` and `--quiet`; the command passes them to `engine_config`."""
    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    command = click.option("--quiet", "-q", is_flag=True, help="No progress bars and no plan on stderr.")(command)
    for name, (kind, text) in reversed(ENGINE_FLAGS.items()):
        kwargs: dict[str, Any] = {"is_flag": True} if kind is bool else {"type": kind}
        if isinstance(defaults[name], tuple):
            kwargs["multiple"] = True
        shown = kind is not bool and defaults[name] not in (None, ())
        two_ways = defaults[name] is True or name == "async_scheduling"
        spelled = f"{flag(name)}/{flag('no_' + name)}" if two_ways else flag(name)
        kwargs |= {"default": defaults[name], "show_default": shown}
        command = click.option(spelled, name, help=text, **kwargs)(command)
    about = ("A directory, a hub name (owner/name), tritium-dense or tritium-moe; with --load-format dummy also a name "
             "of the family: qwen3.6-27b, qwen3.6-35b-a3b, qwen3.5-0.8b, ...")
    return click.option("--model", "model_flag", default=None, help=f"{about}  [default: tritium-dense]")(command)


def engine_config(flags: dict[str, Any], model: str | None = None) -> EngineConfig:
    """Takes the engine's flags out of `flags`. The model may come as an argument or as --model, but not as two."""
    named = flags.pop("model_flag")
    if model and named and model != named:
        raise ConfigError(f"two models are named: {model} and --model {named}", hint="name one")
    fields = {name: flags.pop(name) for name in ENGINE_FLAGS}
    if model or named:
        fields["model"] = model or named
    return EngineConfig(**fields, show_progress=not flags.pop("quiet"))


SAMPLING_FLAGS: dict[str, tuple[Any, str]] = {
    "temperature": (float, "0 takes the most likely token."),
    "top_p": (float, "Keep the most likely tokens that make up this probability."),
    "top_k": (int, "Keep the k most likely tokens; 0 keeps all."),
    "min_p": (float, "Drop tokens below this share of the most likely one."),
    "presence_penalty": (float, "Subtracted once from tokens that appeared."),
    "frequency_penalty": (float, "Subtracted for each time that a token appeared."),
    "repetition_penalty": (float, "Divides the logits of tokens that appeared."),
    "max_tokens": (int, "Longest output; default: up to the model's context."),
    "min_tokens": (int, "Shortest output."),
}
"""Field of `SamplingParams`: type and help. A flag that is not given leaves the checkpoint's default."""


def sampling_flags(command: Command) -> Command:
    """Adds the sampler's flags; the command passes them to `sampling_fields`."""
    command = click.option("--stop", multiple=True, help="End before this text; may be given again.")(command)
    for name, (kind, text) in reversed(SAMPLING_FLAGS.items()):
        command = click.option(flag(name), name, type=kind, default=None, help=text)(command)
    return command


def sampling_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """Takes the sampler's flags out of `flags`: the fields that were given."""
    fields = {name: flags.pop(name) for name in SAMPLING_FLAGS} | {"stop": flags.pop("stop") or None}
    return {name: value for name, value in fields.items() if value is not None}


def thinking_flag(command: Command) -> Command:
    """Adds --thinking/--no-thinking; the command passes it to `template_kwargs`."""
    text = "Whether the model thinks before it answers; default: the template's."
    return click.option("--thinking/--no-thinking", default=None, help=text)(command)


def template_kwargs(flags: dict[str, Any]) -> dict[str, Any]:
    thinking = flags.pop("thinking")
    return {} if thinking is None else {"enable_thinking": thinking}
