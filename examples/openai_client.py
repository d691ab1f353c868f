"""Ask a running server through the OpenAI client, streaming.

    tritium serve                                   # in another terminal
    python examples/openai_client.py [BASE_URL]
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id
question = "Mia has 14 apples. She buys 3 bags with 6 apples each. How many apples does she have now?"

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    temperature=0,
    max_tokens=400,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    for choice in chunk.choices:
        # Thinking comes in a field of its own, before the answer.
        print(getattr(choice.delta, "reasoning_content", None) or choice.delta.content or "", end="", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated")
