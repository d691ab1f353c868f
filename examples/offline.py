"""Answer messages and complete text without a server.

    python examples/offline.py [MODEL]
"""

import sys

from tritium import LLM

with LLM(sys.argv[1] if len(sys.argv) > 1 else "tritium-dense") as llm:
    question = "Ben has 12 books. He buys 2 boxes with 5 books each. How many books does he have now?"
    conversations = [
        [{"role": "user", "content": question}],
        [{"role": "user", "content": "Who are you?"}],
    ]
    for answer in llm.chat(conversations, llm.default_sampling(temperature=0, max_tokens=400)):
        print("thinking:", answer.reasoning.strip())
        print("answer:  ", answer.text.strip())
        print(f"          {answer.usage.completion_tokens} tokens, ended by {answer.finish_reason}\n")

    # Text is continued as it is; n answers of one prompt differ by their seed.
    sampling = llm.default_sampling(temperature=0.8, max_tokens=12, n=2, seed=7)
    for answer in llm.generate("There are 7 days in a", sampling):
        print(f"{answer.index}: {answer.text!r}")
