"""From samples to token ids: the tokenizer, the chat template, and documents with a loss weight for each token."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tritium.eval.tasks import Message, Sample, Task, samples

ASSETS = Path(__file__).parent / "assets"
VOCABULARY = 1536
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]
MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PRETOKENIZE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
               r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # the family's rule: one digit, one token
RECALL_SHARE = 0.01  # of the prompt weight, for texts to recall from: they are long and mostly random


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def load_template(path: Path = ASSETS / "chat_template.jinja") -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(path.read_text())


def prompt_of(template: jinja2.Template, task: Task) -> str:
    return template.render(messages=task.messages, tools=task.tools or None, add_generation_prompt=True,
                           enable_thinking=task.enable_thinking)


def reply_of(message: Message) -> str:
    """What the model writes after the generation prompt, up to and with the end of the turn."""
    text = f"{message['reasoning_content']}\n</think>\n\n" if message.get("reasoning_content") else ""
    text += message["content"]
    for call in message.get("tool_calls", []):
        function = call["function"]
        arguments = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in function["arguments"].items())
        text += f"<tool_call>\n<function={function['name']}>\n{arguments}</function>\n</tool_call>"
    return text + "<|im_end|>"


def parse_reply(text: str, task: Task) -> tuple[str, str, list[tuple[str, dict[str, Any]]]]:
    """Content, reasoning and tool calls of a generation; a malformed call is left in the content."""
    text = text.replace("<|im_end|>", "").replace("<|endoftext|>", "")
    reasoning = ""
    if task.enable_thinking:
        reasoning, _, text = text.partition("</think>")
    calls = []
    pattern = (r"<tool_call>\n<function=([^>\n]+)>\n((?:<parameter=[^>\n]+>\n.*?\n</parameter>\n)*)"
               r"</function>\n</tool_call>")
    for name, body in re.findall(pattern, text, re.DOTALL):
        calls.append((name, dict(re.findall(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", body, re.DOTALL))))
    return re.sub(pattern, "", text, flags=re.DOTALL).strip(), reasoning.strip(), calls


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE on rendered training samples."""
    template, corpus = load_template(), []
    for kind, n in (("word_problems", 6000), ("tool_calls", 6000), ("small_talk", 400), ("conversations", 500)):
        corpus += [prompt_of(template, s.task) + reply_of(s.reply) for s in samples(kind, "train", seed, n)]
    corpus += [prompt_of(template, s.task) + reply_of(s.reply) for s in samples("recall", "train", seed, 1500, 300)]
    corpus = [part for text in corpus for part in re.split("|".join(map(re.escape, SPECIAL + MARKUP)), text) if part]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    size = VOCABULARY - len(SPECIAL) - len(MARKUP)
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in MARKUP])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}")
    return tokenizer


class Documents:
    """Turns samples into (ids, weights): weight 1 on what the assistant writes, `prompt_weight` on the rest."""

    def __init__(self, tokenizer: Tokenizer, prompt_weight: float = 0.0) -> None:
        self.template, self.tokenizer, self.prompt_weight = load_template(), tokenizer, prompt_weight

    def encode(self, sample: Sample) -> tuple[list[int], list[float]]:
        prompt = prompt_of(self.template, sample.task)
        light = self.prompt_weight * (RECALL_SHARE if sample.task.kind == "recall" else 1.0)
        pieces = [(prompt, light), (reply_of(sample.reply), 1.0)]
        trained = [m["content"] for m in sample.task.messages if m.get("trained")]
        if trained:  # answers of earlier turns, found again in the prompt in order
            pieces, rest = [], prompt
            for answer in trained:
                before, mark, rest = rest.partition(f"<|im_start|>assistant\n{answer}<|im_end|>")
                pieces += [(before + "<|im_start|>assistant\n", light), (mark[len("<|im_start|>assistant\n"):], 1.0)]
            pieces += [(rest, light), (reply_of(sample.reply), 1.0)]
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            part = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += part
            weights += [weight] * len(part)
        return ids, weights


def tokenizer_config() -> Mapping[str, Any]:
    return {"add_prefix_space": False, "bos_token": None, "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 8192, "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None}


if __name__ == "__main__":
    train_tokenizer(0).save(sys.argv[1])
